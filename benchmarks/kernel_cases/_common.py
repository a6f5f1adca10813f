"""What the cases of several families share."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernel_cases import Case, Inputs, Peer
from wm_graph.tolerances import UNIT_ROUNDOFF, output_limit
from wm_kernels import numerics


def generator(seed: int = 0) -> torch.Generator:
    """Of random numbers on the CUDA device."""
    return torch.Generator("cuda").manual_seed(seed)


def normal(g: torch.Generator, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    """Normal random numbers."""
    return (torch.randn(shape, generator=g, device="cuda") * scale).to(getattr(torch, dtype))


def over_budget(op: str, dtype: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst error of any output over the op's limit; see `output_limit` for an output that is float32."""
    worst = 0.0
    for got, truth in zip(actual, expected, strict=True):
        limit = output_limit(op, dtype, "float32" if got.dtype == torch.float32 else dtype, "triton")
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


def exactly(case: Case, step: str, steps: float, alike: Callable[[Inputs], bool] | None = None) -> Case:
    """The case with exact numerics, which may take at most twice the time of as many steps.

    Args:
        case: the same work with fast numerics.
        step: the case of one step.
        steps: how many of them do the work.
        alike: whether the work done in pieces has the same bits; the case is infinitely wrong where it has not.
    """

    def ours(v: Inputs) -> Any:
        with numerics("exact"):
            return case.ours(v)

    def oracle(v: Inputs) -> float:
        with numerics("exact"):
            return case.oracle(v) if alike is None or alike(v) else float("inf")

    name, bars = f"{case.name} exact", {f"time ÷ {step}": 2.0 * steps}
    return replace(case, name=name, ours=ours, oracle=oracle, peers={}, bars=bars, designs={})


def split_alike(v: Inputs, tokens: Sequence[str], state: Sequence[str], call: Callable[[Inputs], Tensor]) -> bool:
    """Whether a call in place on all tokens gives the bits of one on all but two, then one on each of these, in outputs and state."""
    T, names = v[tokens[0]].shape[1], tuple(state)
    whole, parts = ({**v, **{name: v[name].clone() for name in names}} for _ in range(2))
    expected, found = call(whole), []
    for first, end in ((0, T - 2), (T - 2, T - 1), (T - 1, T)):
        some = {name: v[name][:, first:end] for name in tokens}
        found.append(call({**parts, **some, "position": v["position"] + first}))
    return torch.equal(torch.cat(found, 1), expected) and all(torch.equal(whole[name], parts[name]) for name in names)


def without_init(name: str) -> None:
    """Make a package's modules importable without running its `__init__`, which asks for much that its kernels do not need."""
    if name not in sys.modules:
        spec = find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is not installed")
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = list(spec.submodule_search_locations)
