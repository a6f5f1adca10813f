"""Every row of the table of op limits, measured. B rows, T tokens."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from onnx_cases import CASES, Case, letters
from wm_graph.tolerances import FLOOR_ULPS, OP_LIMITS, UNIT_ROUNDOFF, OpLimit, model_limit, op_limit, output_limit
from wm_runtimes import availability

CALLS = ((3, 65), (2, 1), (1, 130), (4, 7))
ROWS = 64  # at least as many are pooled for each op
CASES_OF: dict[str, list[str]] = defaultdict(list)
for name, make in CASES.items():
    CASES_OF[make(1, 1).op].append(name)
COPIES = ("next_k", "next_v", "next_score")  # what an op stores is not rounded
CHOICES = ("next_position", "expert")
Outputs = list[np.ndarray]
Values = dict[str, Tensor | None]


def arguments(case: Case, dtype: torch.dtype) -> Values:
    """The op's arguments; those in the model's dtype rounded to it."""
    kinds = dict(case.module.INPUTS)
    return {
        name: None if value is None else torch.from_numpy(value).to(dtype if kinds[name] == "T" else torch.from_numpy(value).dtype)
        for name, value in case.arguments.items()
    }


def as_float64(outputs: Any) -> Outputs:
    return [value.double().numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


def call(case: Case, values: Values, **extra: Any) -> Outputs:
    """The op's outputs in float64."""
    return as_float64(getattr(torch.ops.wm, case.op).default(**values, **(case.extra | extra)))


def in_float64(case: Case, values: Values) -> Outputs:
    wide = {name: value.double() if value is not None and value.is_floating_point() else value for name, value in values.items()}
    return call(case, wide)


def in_eager(case: Case, values: Values) -> Outputs:
    return call(case, values, **({"double": False} if case.op == "rope_angles" else {}))


def runners(name: str, limit: OpLimit) -> list[Callable[[Case, Values], Outputs]]:
    """The ways in which a runtime runs the op of a case, each made once for all its sizes."""
    if limit.runtime == "eager":
        return [in_eager]
    if limit.runtime == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(lambda op, inputs: op(**inputs), backend="eager", fullgraph=True, dynamic=True)
        return [lambda case, values: compiled_call(compiled, case, values)]
    case = CASES[name](1, 1, **half(limit))
    if limit.runtime == "onnxruntime-cuda":
        return [session_call(case, "portable", [("CUDAExecutionProvider", {"use_tf32": "0"})], limit.dtype == "bfloat16")]
    return [session_call(case, flavour) for flavour in ("portable", "ort")]


def compiled_call(compiled: Any, case: Case, values: Values) -> Outputs:
    rest = case.extra | ({"double": False} if case.op == "rope_angles" else {})
    return as_float64(compiled(getattr(torch.ops.wm, case.op).default, values | rest))


def session_call(
    case: Case, flavour: str, providers: Sequence[Any] = ("CPUExecutionProvider",), bfloat16: bool = False
) -> Callable[[Case, Values], Outputs]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    file = case.in_bfloat16() if bfloat16 else case.model(flavour)
    model = ort.InferenceSession(file.SerializeToString(), options, providers=list(providers))

    def run(_: Case, values: Values) -> Outputs:
        given = {name: value for name, value in values.items() if value is not None}
        # numpy has no bfloat16: the model takes the same values in float32.
        found = model.run(
            None, {name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in given.items()}
        )
        return [value.astype(np.float64) for value in found]

    return run


def half(limit: OpLimit) -> dict[str, Any]:
    return {"half": True} if limit.dtype == "float16" else {}


def live(case: Case, outputs: Outputs) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, kind and value of each output; padding has no meaning."""
    for (name, kind), value in zip(case.module.OUTPUTS, outputs, strict=True):
        if letters(name)[:2] == ["B", "T"] and (valid_B := case.arguments.get("valid_B")) is not None:
            value = value[np.arange(value.shape[1]) < valid_B[:, None]]
        yield name, kind, value


@dataclass
class Pool:
    """What one output of an op is off by, over all draws, as shares of its scale in each draw."""

    worst: float = 0.0
    squares: float = 0.0
    eager_squares: float = 0.0
    scale_squares: float = 0.0
    count: int = 0

    def add(self, found: np.ndarray, eager: np.ndarray, expected: np.ndarray) -> None:
        scale = np.abs(expected).max(initial=0.0) or 1.0
        self.worst = max(self.worst, float(np.abs(found - expected).max(initial=0.0) / scale))
        self.squares += float(np.square((found - expected) / scale).sum())
        self.eager_squares += float(np.square((eager - expected) / scale).sum())
        self.scale_squares += float(np.square(expected / scale).sum())
        self.count += expected.size

    def R(self, u: float) -> float:
        return (self.squares / max(self.eager_squares, (FLOOR_ULPS * u) ** 2 * self.scale_squares)) ** 0.5


@dataclass
class Measured:
    """The outputs of one op in one runtime."""

    pools: dict[tuple[str, str], Pool] = field(default_factory=lambda: defaultdict(Pool))
    choices: int = 0
    differing: int = 0

    def add(self, case: Case, found: Outputs, eager: Outputs, expected: Outputs) -> None:
        for (name, kind, value), (_, _, of_eager), (_, _, reference) in zip(
            live(case, found), live(case, eager), live(case, expected), strict=True
        ):
            if name.startswith(CHOICES):
                self.choices += reference.size
                self.differing += int((np.sort(value, -1) != np.sort(reference, -1)).sum())
            elif not name.startswith(COPIES):
                self.pools[name, kind].add(value, of_eager, reference)


def measure(limit: OpLimit) -> Measured:
    if (reason := availability(limit.runtime)) is not None:
        pytest.skip(reason)
    measured, names = Measured(), CASES_OF[limit.op]
    rounds = -(-ROWS // (len(names) * sum(B for B, _ in CALLS)))
    for name in names:
        runs = runners(name, limit)
        for seed, (B, T) in enumerate(CALLS * rounds):
            case = CASES[name](B, T, seed=seed, **half(limit))
            values = arguments(case, getattr(torch, limit.dtype))
            expected, eager = in_float64(case, values), in_eager(case, values)
            for run in runs:
                measured.add(case, run(case, values), eager, expected)
    return measured


# The kernels of the runtime "triton" have tests of their own, tests/test_triton_*.py.
@pytest.mark.parametrize(
    "limit", [one for one in OP_LIMITS if one.runtime != "triton"], ids=lambda limit: f"{limit.op}-{limit.dtype}-{limit.runtime}"
)
def test_op_is_within_its_limits(limit: OpLimit) -> None:
    measured = measure(limit)
    assert measured.pools
    for (name, kind), pool in measured.pools.items():
        # A state is float32 in any model: rounding it to the model's dtype must not pass.
        own = output_limit(limit.op, limit.dtype, limit.dtype if kind == "T" else "float32", limit.runtime)
        assert pool.worst <= own.relative, name
        assert pool.R(UNIT_ROUNDOFF[own.dtype]) <= own.R * (1 + 1e-9), name
    assert measured.differing <= limit.choice_rate * measured.choices
    assert bool(measured.choices) == bool(limit.choice_rate)


def test_a_state_rounded_to_half_precision_is_over_its_limit() -> None:
    limit = op_limit("ssd_scan", "float16", "eager")
    case = CASES["ssd_scan"](3, 65, half=True)
    values = arguments(case, torch.float16)
    y, state = in_eager(case, values)
    measured = Measured()
    measured.add(case, [y, state.astype(np.float16).astype(np.float64)], [y, state], in_float64(case, values))
    pool = measured.pools["next_BHNP", "tensor(float)"]
    assert pool.worst > op_limit("ssd_scan", "float32", "eager").relative
    assert pool.R(UNIT_ROUNDOFF["float32"]) > limit.R


def test_a_model_that_amplifies_rounding_is_held_to_what_its_oracle_moves_and_never_to_more_than_ten_times_the_table() -> None:
    limit = model_limit("float32", "onnxruntime-cpu")
    assert limit.max_abs_at(scale=0.5, moved_max_abs=1e-6) == limit.max_abs
    assert limit.max_abs_at(scale=3.0, moved_max_abs=1e-6) == pytest.approx(3 * limit.max_abs)
    assert limit.max_abs_at(scale=1.0, moved_max_abs=0.3 * limit.max_abs) == pytest.approx(20 * 0.3 * limit.max_abs)
    for wrong in (1.0, float("inf"), float("nan")):
        assert limit.max_abs_at(scale=1.0, moved_max_abs=wrong) <= 10 * limit.max_abs
