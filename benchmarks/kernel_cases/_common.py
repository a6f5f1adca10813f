"""What the cases of several families share."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernel_cases import Inputs, Peer
from wm_graph.tolerances import UNIT_ROUNDOFF, op_limit


def generator(seed: int = 0) -> torch.Generator:
    """Of random numbers on the CUDA device."""
    return torch.Generator("cuda").manual_seed(seed)


def normal(g: torch.Generator, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    """Normal random numbers."""
    return (torch.randn(shape, generator=g, device="cuda") * scale).to(getattr(torch, dtype))


def over_budget(op: str, dtype: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst error of any output over the op's limit; an output that is float32 has the limits of float32."""
    worst = 0.0
    for got, truth in zip(actual, expected, strict=True):
        limit = op_limit(op, "float32" if got.dtype == torch.float32 else dtype, "triton")
        allowed = limit.ulps * UNIT_ROUNDOFF[limit.dtype] * truth.abs().max().item()
        error = (got.double() - truth).abs().max().item() if got.isfinite().all() else float("inf")
        worst = max(worst, error / allowed)
    return worst


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Floating-point tensors in float64, others as they are."""
    return [tensor.double() if tensor is not None and tensor.is_floating_point() else tensor for tensor in tensors]


def eager(function: Callable[..., Any], *names: str, **fixed: Any) -> Peer:
    """A function of the named inputs as a peer."""
    return lambda inputs: lambda: function(*(inputs[name] for name in names), **fixed)


def compiled(function: Callable[..., Any], *names: str, mode: str = "max-autotune-no-cudagraphs", **fixed: Any) -> Peer:
    """The same function under torch.compile with static shapes."""

    def make(inputs: Inputs) -> Callable[[], Any]:
        made = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
        return lambda: made(*(inputs[name] for name in names), **fixed)

    return make


def once(inputs: Inputs, truth: Callable[[], Any]) -> Any:
    """The float64 answer for these inputs, which must not change; made at the first call."""
    if "truth" not in inputs:
        inputs["truth"] = truth()
    return inputs["truth"]


def without_init(name: str) -> None:
    """Make a package's modules importable without running its `__init__`, which asks for much that its kernels do not need."""
    if name not in sys.modules:
        spec = find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is not installed")
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = list(spec.submodule_search_locations)
