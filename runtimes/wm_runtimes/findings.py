"""What `bisect` compares and what it finds: plain data. Needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from wm_runtimes.bundle import Bundle
from wm_runtimes.json_values import json_values
from wm_runtimes.labels import split_label
from wm_runtimes.onnxruntime_session import GRAPHS

ORACLE = "oracle"


@dataclass(frozen=True)
class Target:
    """One side: a bundle, and a runtime of it.

    Attributes:
        bundle: an open bundle.
        runtime: a key of `RUNTIMES`, or `oracle`, the float64 references, which are right by definition.
        way: which of the runtime's ways to run, as labels name them; empty for its own choice.
    """

    bundle: Bundle
    runtime: str
    way: str = ""

    @property
    def label(self) -> str:
        """As `--a` and `--b` take it."""
        return f"{self.runtime}:{self.way}" if self.way else self.runtime


def parse_target(bundle: Bundle, text: str) -> Target:
    """`eager`, `oracle`, `onnxruntime-cpu`, `onnxruntime-cpu:model.onnx`, `onnxruntime-cuda:bodies`.

    Raises:
        ConfigError: there is no such runtime or way.
    """
    runtime, way = split_label(text, (ORACLE,))
    return Target(bundle, runtime, "" if way == GRAPHS[0] else way)


@dataclass(frozen=True)
class Finding:
    """The first tensor out of budget.

    Attributes:
        tensor: its name; `*_in` is what an op was given, other names are those of taps.
        module: the part of the model that made it, as its parameters are called.
        op: the op that made it; `model` for code between ops, `parameter` for a weight, `session` for what the runtime does around the ops.
        output: which output of the op, or which input of the next.
        reads: parameters that the code between ops applies.
        step: in words.
        step_number: from 0; the pieces of the prompts come first. -1 for a weight.
        runtime: which side is wrong.
        index: where the largest error is; windows' slots are counted in order of position.
        a: the value of the first side there; None where it has none.
        b: the value of the second side.
        expected: the value that float64 gives there, from what the side at fault had been given; for a weight, the first side's.
        R: rms error over the yardstick's; of a choice, None.
        R_limit: its limit.
        error: the largest error; of a choice, its shortfall in score budgets.
        limit: its limit.
    """

    tensor: str
    module: str
    op: str
    output: str
    reads: tuple[str, ...]
    step: str
    step_number: int
    runtime: str
    index: tuple[int, ...]
    a: float | None
    b: float | None
    expected: float | None
    R: float | None
    R_limit: float
    error: float | None
    limit: float


@dataclass(frozen=True)
class Report:
    """What a bisection found.

    Attributes:
        a: the first side.
        b: the second side.
        tensors: tensors between the first token and the last.
        runs: runs of the side that ran most often.
        finding: the first tensor out of budget, or None.
    """

    a: str
    b: str
    tensors: int
    runs: int
    finding: Finding | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        found: dict[str, Any] = json_values(asdict(self))
        return found
