"""Launches: what Triton compiled is launched again, and only where it would take the same; lengths share what is compiled."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wm_kernels.numerics import numerics
from wm_kernels.triton_launch import Launch, Plan, Scratch, _run_on_cuda, call_key, compile_together, known_plan

ROOT = Path(__file__).parents[1]


CPU = torch.device("cpu")
LAUNCHED = ("stream of None", "function", "packed", None, None, None)  # what a compiled kernel takes before its arguments


class Kernel:
    """In place of a `triton.JITFunction`: notes what is asked of it, and what is asked of what it compiled."""

    arg_names = ("x", "n", "y", "BLOCK", "EVEN")

    def __init__(self):
        self.looked_at, self.launched = [], []

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            self.looked_at.append((grid, arguments, constants))
            return Compiled(self.launched)

        return call


class Compiled:
    """In place of what Triton compiled; `hooked` are launches that Triton's own code makes."""

    function, packed_metadata = "function", "packed"

    def __init__(self, launched):
        self.launched = launched

    def run(self, x, y, z, *arguments):
        self.launched.append(((x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, ("hooked", *arguments)))


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """The parts of a driver and of Triton that a machine without them lacks; the hooks of a profiler."""
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr("wm_kernels.triton_launch._stream", lambda device: f"stream of {device}")
    monkeypatch.setattr("wm_kernels.triton_launch._knobs", lambda: hooks)
    monkeypatch.setattr("wm_kernels.triton_launch._start_compiler", lambda: None)
    monkeypatch.setattr("wm_kernels.triton_launch._compile", lambda *launch: None)
    return hooks


def launch(kernel, grid=(3, 2)):
    return Launch(kernel, grid, ("x", 7, "y"), {"EVEN": True, "BLOCK": 64}, num_warps=2)


def test_second_launch_takes_what_the_first_compiled(driver):
    kernel = Kernel()
    plan, tensors = Plan((launch(kernel),)), {"x": torch.zeros(8), "y": torch.zeros(8)}
    for _ in range(3):
        _run_on_cuda(plan, tensors, CPU)
    options = {"num_warps": 2, "num_stages": 2, "maxnreg": None}
    assert kernel.looked_at == [((3, 2), (tensors["x"], 7, tensors["y"]), {"EVEN": True, "BLOCK": 64, **options})]
    pointers = (tensors["x"].data_ptr(), 7, tensors["y"].data_ptr(), 64, True)
    assert kernel.launched == [((3, 2, 1), (*LAUNCHED, *pointers))] * 2
    driver.launch_enter_hook.calls.append("a profiler's")
    _run_on_cuda(plan, tensors, CPU)
    assert kernel.launched[2:] == [((3, 2, 1), ("hooked", *pointers))]


def test_launches_share_one_piece_of_scratch():
    kernel, one, two = Kernel(), Scratch((3,), torch.float64), Scratch((40,), torch.int64)
    plan = Plan((launch(kernel), Launch(kernel, (1,), ("y", 5, "z"), {"EVEN": False, "BLOCK": 1})), {"y": one, "z": two})
    x = torch.zeros(8)
    for _ in range(2):
        _run_on_cuda(plan, {"x": x}, CPU)
    (_, first), (_, second) = kernel.launched
    first, second = first[len(LAUNCHED) :], second[len(LAUNCHED) :]
    assert first == (x.data_ptr(), 7, second[0], 64, True)
    assert second == (first[2], 5, first[2] + 256, 1, False)
    assert plan.places == ((0, 256), 768)


@pytest.mark.parametrize("what", ["alignment", "dtype", "device"])
def test_launch_that_triton_would_compile_anew_goes_through_triton(what):
    kernel = Kernel()
    plan, tensors = Plan((launch(kernel),)), {"x": torch.zeros(8), "y": torch.zeros(8)}
    others = {"alignment": tensors | {"y": torch.zeros(9)[1:]}, "dtype": tensors | {"y": torch.zeros(8, dtype=torch.float16)}}
    _run_on_cuda(plan, tensors, CPU)
    _run_on_cuda(plan, others.get(what, tensors), torch.device("meta", 1) if what == "device" else CPU)
    assert len(kernel.looked_at) == 2
    assert not kernel.launched


def test_a_call_is_checked_once_for_its_shapes_and_its_tensors_are_copied_every_time():
    known, made, checked = {}, [], []

    def call(x, flag=0):
        given = {"x": x}
        key = (flag, *call_key(x))
        plan = known_plan(known, key, given, lambda ready: made.append(ready["x"].stride()) or Plan(()), lambda: checked.append(flag))
        return plan, given["x"]

    strided = [torch.randn(4, 3).t() for _ in range(2)]
    first, second = call(strided[0]), call(strided[1])
    assert first[0] is second[0]
    assert (made, checked) == ([(4, 1)], [0])
    for (_, copied), x in zip((first, second), strided, strict=True):
        assert copied.is_contiguous()
        assert torch.equal(copied, x)
    rows = torch.randn(3, 4)
    assert call(rows)[1] is rows  # other strides are another call
    call(rows, 1)
    with numerics("exact"):
        call(rows, 1)
    call(rows.double(), 1)
    assert checked == [0, 0, 1, 1, 1]


def test_what_a_check_refuses_is_not_remembered():
    def refuse():
        raise RuntimeError("wm::op: no")

    known = {}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            known_plan(known, (), {}, lambda _: Plan(()), refuse)
    assert not known


def test_empty_grid_launches_nothing():
    kernel = Kernel()
    plan = Plan((launch(kernel, (0, 2)),))
    for _ in range(2):
        _run_on_cuda(plan, {"x": torch.zeros(8), "y": torch.zeros(8)}, CPU)
    assert not kernel.looked_at


def test_new_kernels_of_a_plan_are_compiled_side_by_side_and_once(monkeypatch):
    started, both = [], threading.Barrier(2, timeout=30)

    def compile_one(launch, dtypes, device):
        started.append((launch.num_warps, dtypes["x"], device))
        both.wait()  # breaks unless two are under way

    monkeypatch.setattr("wm_kernels.triton_launch._compile", compile_one)
    kernel, tensors = Kernel(), {"x": torch.zeros(8), "y": torch.zeros(8)}
    plan = Plan((launch(kernel), replace(launch(kernel), num_warps=8), replace(launch(kernel), num_warps=8)))
    for _ in range(2):
        compile_together(plan, tensors, 0)
    assert sorted(started, key=str) == sorted([(2, torch.float32, 0), (8, torch.float32, 0)], key=str)


LENGTHS = """
import torch
from wm_kernels.residual_rms_norm.plan import plan
from wm_kernels.triton_compile import compile_plan

names = dict.fromkeys(("x_MD", "residual_MD", "scale_D", "weight_D", "normed_MD", "sum_MD"), torch.bfloat16)
plans = [plan(M, 2048, torch.bfloat16, 1e-6, True, 2048, 2048, "sm_90") for M in (1024, 1023)]
one, other = (compile_plan(plan, names, 90)[0].asm["ptx"] for plan in plans)
assert one == other
"""


CALLERS = """
import contextlib
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from wm_kernels import triton_launch
from wm_kernels.router_topk.plan import plan


class Driver:
    built = []

    def launcher_cls(self, source, metadata):
        self.built.append(source)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
(launch,) = plan(4096, 64, 8, torch.bfloat16, False, 64, "sm_90").launches
arguments = [*(torch.bfloat16, torch.bfloat16, torch.int64), *launch.arguments[3:]]
triton_launch._build_caller(launch, arguments, 0)
compiled = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **launch.options)
(source,) = Driver.built
assert (source.signature, source.constants) == (compiled.src.signature, compiled.src.constants)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("program", [LENGTHS, CALLERS], ids=["lengths", "callers"])
def test_what_triton_compiles(program):
    """Lengths divisible by 16 or not compile to the same; what calls a kernel is built early for the kernel that is compiled."""
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
