"""What ops launch on an H100, without one: their CUDA forms on tensors that hold nothing, with a launcher that notes plans."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from wm_kernels import triton_launch
from wm_kernels.triton_launch import Plan

PLANNED = (
    "residual_rms_norm", "gated_rms_norm", "rope", "causal_conv1d", "router_topk", "product_key_topk", "expert_mix", "moe_mix",
    "selective_scan", "ssd_scan", "attention", "attention_rope", "keep_window_attention", "linear",
)  # fmt: skip


def plans_of(op: str) -> Any:
    """The module that plans an op."""
    return import_module(f"wm_kernels.{op}.plan")


def _forget() -> None:
    """Every plan is made anew, for the architecture that is then asked for."""
    triton_launch.architecture.cache_clear()
    for op in PLANNED:
        launcher = import_module(f"wm_kernels.{op}.triton_op")
        for value in (*vars(plans_of(op)).values(), *vars(launcher).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
        getattr(launcher, "_known", {}).clear()


@contextmanager
def fake_h100() -> Iterator[list[Plan]]:
    """While this lasts, tensors may be made on "cuda", and `launch` adds plans to the list."""
    plans: list[Plan] = []
    _forget()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(triton_launch, "_run_on_cuda", lambda plan, tensors, device: plans.append(plan))
        yield plans
    _forget()


def launch(op: Any, arguments: tuple[Any, ...]) -> None:
    """An op's CUDA form; where it goes on with torch's own kernels, a torch without CUDA may not know what comes of them."""
    try:
        op._op_dk(torch._C.DispatchKey.CUDA, *arguments)
    except DynamicOutputShapeException:
        pass
    except RuntimeError as error:
        if "not linked with support for cuda" not in str(error):
            raise
