"""Whether one op, or the code between two ops, did what it should with what it really got: depth and earlier errors play no part.

An op is judged against its float64 reference on the inputs that the runtime gave it, by `tolerances.op_limit`. What lies between ops is
judged against the model in float64 whose ops are answered by what the runtime's ops gave; its yardstick is how far that moves when every
recorded value is moved by up to one unit of roundoff.

B rows, T tokens, k picks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF, one_run_R, op_limit
from wm_runtimes.labels import runs_graphs
from wm_runtimes.op_calls import SELECTING, Call, Step, arguments_of, run_reference, token_mask
from wm_runtimes.plain_model import PlainModel, choosing
from wm_runtimes.selections import judge_experts, judge_router


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from what it should be, over the entries that count.

    Attributes:
        rms: root mean square of the errors.
        largest: the largest error; inf where only one of the two is no number.
        scale: largest expected |value|.
        scale_rms: root mean square of the expected values.
        index: where the largest error is.
    """

    rms: float
    largest: float
    scale: float
    scale_rms: float
    index: tuple[int, ...]


def distance(actual: Tensor, expected: Tensor, counts: Tensor) -> Distance:
    """Compare a tensor with what it should be, where `counts` is true."""
    found, wanted = actual.double(), expected.double()
    error = torch.where(counts & (found != wanted), (found - wanted).abs().nan_to_num(torch.inf, torch.inf), 0.0)
    size = torch.where(counts & wanted.isfinite(), wanted.abs(), 0.0)
    if not error.numel() or not counts.any():
        return Distance(0.0, 0.0, 0.0, 0.0, ())
    number = int(counts.sum())
    place = torch.unravel_index(error.argmax(), error.shape)
    rms = [float((value.square().sum() / number).sqrt()) for value in (error, size)]
    return Distance(rms[0], float(error.max()), float(size.max()), rms[1], tuple(int(axis) for axis in place))


@dataclass(frozen=True)
class Check:
    """The verdict on one tensor, given what it was made from.

    Attributes:
        tensor: its name.
        call: the op that made it, or, for what lies between ops, the op that reads it; None for the logits.
        between: whether the code between ops made it, and no op.
        R: rms error over the yardstick's.
        R_limit: its limit.
        largest: the largest error; of choices, the shortfall in score budgets.
        limit: its limit.
        index: where it is.
        expected: the value that it should have there.
    """

    tensor: str
    call: Call | None
    between: bool
    R: float
    R_limit: float
    largest: float
    limit: float
    index: tuple[int, ...]
    expected: float

    @property
    def passed(self) -> bool:
        """Both are within their limits; NaN is not."""
        return self.largest <= self.limit and self.R_limit >= self.R


class Judge:
    """Judges the tensors of steps that a runtime told in full.

    Args:
        model: the model whose runtime it is.
        runtime: which limits hold.
    """

    def __init__(self, model: PlainModel, runtime: str) -> None:
        self._model, self._runtime = model, runtime
        self._dtype = str(model.dtype).removeprefix("torch.")

    def failures(self, step: Step) -> Iterator[Check]:
        """The tensors of a step that are out of budget, in the order in which they are made."""
        return (check for check in self._checks(step) if not check.passed)

    def _checks(self, step: Step) -> Iterator[Check]:
        ideal = self._model.between_ops(step)
        moved = self._model.between_ops(step, UNIT_ROUNDOFF[self._dtype])
        # What a runtime has as a constant it does not tell.
        step.values = {name: value.to(self._model.dtype) for name, value in ideal.values.items() if value.is_floating_point()} | step.values
        for call in self._model.calls:
            yield from self._numbers(call, step)
            for name, one in call.inputs.items():
                value = step.values[name]
                mask = token_mask(value, step.counts_BT) if one.by_token else torch.ones_like(value, dtype=torch.bool)
                yield self._between(name, call, value, ideal.values[name], moved.values[name], mask)
            yield from self._op(call, step)
        mask = token_mask(step.logits_BTV, step.counts_BT)
        yield self._between("logits", None, step.logits_BTV, ideal.logits_BTV, moved.logits_BTV, mask)

    def _numbers(self, call: Call, step: Step) -> Iterator[Check]:
        """What a call was told of positions and lengths, where the runtime computed it."""
        for name, kind in call.given.items():
            if name in step.values:
                wanted = step.given(kind)
                error = distance(step.values[name], wanted, torch.ones_like(wanted, dtype=torch.bool))
                yield _check(name, call, True, error, 0.0, 0.0, wanted, 0.0)

    def _between(self, name: str, call: Call | None, actual: Tensor, ideal: Tensor, moved: Tensor, mask: Tensor) -> Check:
        if actual.shape != ideal.shape:
            return Check(name, call, True, torch.inf, 0.0, torch.inf, 0.0, (), torch.nan)
        error = distance(actual, ideal, mask)
        if not actual.is_floating_point():
            return _check(name, call, True, error, 0.0, 0.0, ideal, 0.0)
        R_limit = one_run_R("between", self._dtype)
        yardstick = distance(moved, ideal, mask)
        u = FLOOR_ULPS * UNIT_ROUNDOFF[self._dtype]
        below = max(yardstick.rms, u * error.scale_rms)
        return _check(name, call, True, error, below, R_limit * max(yardstick.largest, u * error.scale), ideal, R_limit)

    def _op(self, call: Call, step: Step) -> Iterator[Check]:
        outputs = step.outputs(call)
        if call.op in SELECTING:
            choice = self._choice(call, step, outputs[f"{call.name}.expert"])
            yield choice
            if not choice.passed:
                return
        expected, own = (self._reference(call, step, outputs, double) for double in (True, False))
        found, wanted, plain = (step.compared(call, values) for values in (outputs, expected, own))
        for name, (value, mask) in found.items():
            if value.is_floating_point() or call.op not in SELECTING:
                yield self._output(name, call, value, wanted[name][0], plain[name][0], mask)

    def _output(self, name: str, call: Call, value: Tensor, wanted: Tensor, plain: Tensor, mask: Tensor) -> Check:
        if value.shape != wanted.shape:
            return Check(name, call, False, torch.inf, 0.0, torch.inf, 0.0, (), torch.nan)
        error = distance(value, wanted, mask)
        if not value.is_floating_point():
            return _check(name, call, False, error, 0.0, 0.0, wanted, 0.0)
        dtype = str(value.dtype).removeprefix("torch.")
        limit = op_limit(call.op, dtype, self._runtime).relative * error.scale + _least(value.dtype)
        # A reference that is wrong in this dtype alone, past eager's own limit, is no yardstick.
        plain_rms = min(distance(plain, wanted, mask).rms, op_limit(call.op, dtype, "eager").relative * error.scale)
        below = max(plain_rms, FLOOR_ULPS * UNIT_ROUNDOFF[dtype] * error.scale_rms + _least(value.dtype))
        return _check(name, call, False, error, below, limit, wanted, one_run_R("op", dtype))

    def _reference(self, call: Call, step: Step, outputs: Mapping[str, Tensor], double: bool) -> dict[str, Tensor]:
        """What the op's reference makes of the same inputs, in float64 or as they are; where it chooses, of the choice that was made."""
        args = step.arguments(call, torch.float64 if double else None)
        if double and call.op == "rope_angles":
            args = tuple(True if one.name == "double" else value for one, value in zip(arguments_of(call.op), args, strict=True))
        made = run_reference(call.op, args)
        if call.op in SELECTING:
            made = choosing(call.op, args, made, outputs[f"{call.name}.expert"])
        return dict(zip(outputs, made, strict=True))

    def _choice(self, call: Call, step: Step, expert: Tensor) -> Check:
        """Judge a choice by the scores that the op itself was given: only scores that rounding can exchange may be exchanged.

        Equal scores leave no freedom: the lower index comes first. But what ONNX Runtime tells as equal in half precision it may have held
        in float32, where they differ.
        """
        args = step.arguments(call, torch.float64)
        own = run_reference(call.op, args)[1]
        budget = op_limit(call.op, self._dtype, self._runtime).relative
        excess = _excess(call, args, expert, budget, step.counts_BT)
        differs = (expert.sort(-1).values != own.sort(-1).values).any(-1, keepdim=True)
        differs = differs.expand_as(expert) & token_mask(expert, step.counts_BT)
        exact = self._dtype == "float32" or not runs_graphs(self._runtime)
        if exact and excess <= 1.0 and differs.any() and _excess(call, args, expert, 0.0, step.counts_BT) == 0.0:
            excess = torch.inf  # no score is worse, so that equal ones were taken in another order
        index = tuple(int(axis) for axis in differs.nonzero()[0]) if differs.any() else ()
        wanted = float(own[index]) if index else torch.nan
        return Check(f"{call.name}.expert", call, False, 0.0, 0.0, excess, 1.0, index, wanted)


def _excess(call: Call, args: tuple[Any, ...], expert: Tensor, budget: float, counts_BT: Tensor) -> float:
    """The worst shortfall of a choice in budgets; 0 where no score is worse than the reference's."""
    shape = (*counts_BT.shape, -1)
    if call.op == "router_topk":
        logits = args[0].reshape(*shape, args[0].shape[-1])
        return judge_router(logits.numpy(), expert.reshape(*shape, expert.shape[-1]).numpy(), budget, counts_BT.numpy()).excess
    return judge_experts(args[0].numpy(), args[1].numpy(), expert.numpy(), budget, counts_BT.numpy()).excess


def _least(dtype: torch.dtype) -> float:
    """The smallest number above 0: nothing is exact below it."""
    return float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def _check(
    name: str, call: Call | None, between: bool, error: Distance, below: float, limit: float, wanted: Tensor, R_limit: float
) -> Check:
    R = error.rms / below if below else (0.0 if not error.rms else torch.inf)
    expected = float(wanted[error.index]) if error.index else torch.nan
    return Check(name, call, between, R, R_limit, error.largest, limit, error.index, expected)
