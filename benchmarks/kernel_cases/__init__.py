"""What `benchmarks/kernels.py` measures: one `Case` per op, shape and dtype, from the module of each family here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pkgutil import iter_modules
from typing import Any

Inputs = dict[str, Any]
Peer = Callable[[Inputs], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: name without `wm::`, or of a layer.
        name: of the shape, unique for the op: `S1`, `M`, `T 512 B 1`.
        dtype: `float32`, `float16` or `bfloat16`.
        make: the inputs, on the current CUDA device, from a fixed seed.
        ours: runs the op on the inputs.
        oracle: runs the op on the inputs, in each of its designs, and gives the worst error over its budget: at most 1 is right.
        peers: by name, what makes a callable from the inputs; ImportError or RuntimeError with the reason where it cannot run.
            One may be a part of another's work, such as the mask or the rotation that a peer lacks.
        designs: by name, what runs the op in other designs of ours than the one that it chooses, judged by the oracle too.
        bytes: fewest that the op must move through device memory.
        flops: floating-point operations it must do.
        bars: what is to be reached, by one of these texts:
            `× PEER`            at least this ratio of the peer's time to ours; `× PEER + PART` adds the times of several
            `× the fastest of our designs`  at least this ratio of the least time of `designs` to ours
            `copy rate`         at least this share of the measured copy rate
            `matmul rate`       at least this share of the measured bf16 matmul rate
            `memory ÷ PEER`     at most this ratio of our extra memory to the peer's
            `time ÷ CASE`       at most this ratio of our time to our time in the named case of the same op and dtype
            `launches`          at most this many kernels in one call
    """

    op: str
    name: str
    dtype: str
    make: Callable[[], Inputs]
    ours: Callable[[Inputs], Any]
    oracle: Callable[[Inputs], float]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    designs: Mapping[str, Callable[[Inputs], Any]] = field(default_factory=dict, kw_only=True)
    bytes: int = 0
    flops: int = 0
    bars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Space:
    """Configurations that `benchmarks/tune.py` tries for one regime of an op.

    Attributes:
        case: what is timed; its op's `triton_configs.json` gets the row.
        regime: the regime that the case is in.
        dims: the dimensions that the row names, by letter; empty for a row that serves all.
        start: the values to begin with; all of them.
        groups: what is tried, group after group, with everything that a group does not name at its best so far.
    """

    case: Case
    regime: str
    dims: Mapping[str, int]
    start: Mapping[str, int]
    groups: Sequence[Sequence[Mapping[str, int]]]


def grid(**values: Sequence[int]) -> list[dict[str, int]]:
    """The product of lists of values by name, as a group of a `Space`."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def all_cases() -> list[Case]:
    """The cases of every family, in the order of their modules' names; names that start with _ are helpers."""
    return [case for family in _families() for case in family.cases()]


def chosen(ops: Sequence[str], names: Sequence[str]) -> list[Case]:
    """The cases of these ops that have these names; none given are all."""
    return [case for case in all_cases() if (not ops or case.op in ops) and (not names or case.name in names)]


def all_spaces() -> list[Space]:
    """The spaces of every family that has any: a function `spaces` beside `cases`."""
    return [space for family in _families() if hasattr(family, "spaces") for space in family.spaces()]


def _families() -> list[Any]:
    return [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if not module.name.startswith("_")]
