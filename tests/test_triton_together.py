"""Compiling the kernels of one call side by side: what is asked of Triton, in place of which a stand-in takes notes."""

import threading
from contextlib import nullcontext

import pytest
import torch

from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_together import compile_together

CUDA = torch.device("cuda", 0)


class Kernel:
    """In place of a `triton.JITFunction`; every compilation waits until as many are under way as `barrier` wants."""

    arg_names = ("x", "n", "y", "BLOCK")

    def __init__(self, barrier):
        self.barrier, self.asked = barrier, []

    def warmup(self, *arguments, **rest):
        self.barrier.wait(timeout=20)
        self.asked.append((arguments, rest))
        return self

    def _init_handles(self):
        pass


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", nullcontext)


def plan_of(*kernels, block=64):
    return Plan(tuple(Launch(kernel, (1,), ("x", 7, "y"), {"BLOCK": block}) for kernel in kernels), {"y": Scratch((2,), torch.float16)})


def test_new_kernels_are_compiled_at_the_same_time_and_once():
    barrier = threading.Barrier(2)
    one, other, x = Kernel(barrier), Kernel(barrier), torch.zeros(4)
    for _ in range(2):
        compile_together(plan_of(one, other), {"x": x}, CUDA)
    for kernel in (one, other):
        ((arguments, rest),) = kernel.asked
        assert arguments == (x, 7, torch.float16)
        assert rest == {"grid": (1,), "BLOCK": 64, "num_warps": 4, "num_stages": 2, "maxnreg": None}


def test_a_single_new_kernel_is_left_to_its_launch():
    kernel = Kernel(threading.Barrier(1))
    compile_together(plan_of(kernel), {"x": torch.zeros(4)}, CUDA)
    compile_together(plan_of(kernel, kernel, block=32), {"x": torch.zeros(4)}, CUDA)
    assert not kernel.asked


def test_nothing_is_compiled_for_the_interpreter():
    kernels = [Kernel(threading.Barrier(1)) for _ in range(2)]
    compile_together(plan_of(*kernels), {"x": torch.zeros(4)}, torch.device("cpu"))
    assert not any(kernel.asked for kernel in kernels)
