"""The first tensor that is out of budget, between two runtimes or two bundles of one configuration, in log-many runs.

1. One run of each side, of which nothing is recorded, tells every step's logits and states; where the model chooses, another run tells
   the choices. Each tensor is measured against a float64 oracle that makes the side's choices:
   R = rms(side - oracle) / rms(yardstick - oracle), the yardstick being the plain references in the model's dtype. The first step with a
   tensor far out is where to look.
2. A binary search over the ops of that step, in the order in which they run, each probe a run that records one op.
3. One run that records all that led there. Every op is judged on the inputs that it really got, and every stretch of code between ops on
   the outputs it really got (`op_checks`): the first that fails is at fault, whatever an error did further down, and a different but
   legitimate choice fails nothing. If none does, one run records all steps: errors that later steps hide are found too.

An error that is there while little is recorded, and gone when all is, lies in what recording changes: then the binary search decides. One
that is there only while nothing is recorded is the session's own.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from wm_graph.checkpoints import load_tensors
from wm_graph.errors import ConfigError, InputError, RuntimeUnavailableError
from wm_graph.shapes import parameter_shapes
from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF, one_run_R
from wm_runtimes import availability
from wm_runtimes.bundle import Bundle
from wm_runtimes.findings import ORACLE, Finding, Report, Target
from wm_runtimes.labels import runs_graphs
from wm_runtimes.op_calls import SELECTING, Call, Step, token_mask
from wm_runtimes.op_checks import Check, Judge, distance
from wm_runtimes.op_probes import OnnxProbe, Probe, TorchProbe, Wanted
from wm_runtimes.parity import Progress
from wm_runtimes.plain_model import Feed, PlainModel


def bisect(a: Target, b: Target, feed: Feed, progress: Progress | None = None) -> Report:
    """Find the first tensor in which a side is out of budget.

    Args:
        a: the first side.
        b: the second side.
        feed: what both are fed.
        progress: called with what is being done and the fraction done.

    Raises:
        ConfigError: the sides are the same, or of different configurations.
        RuntimeUnavailableError: a runtime cannot run here, or cannot run the bundle.
        InputError: a token is outside the vocabulary.
    """
    _check_sides(a, b, feed)
    if (finding := _differing_weight(a, b)) is not None:
        return Report(a.label, b.label, len(parameter_shapes(a.bundle.config)), 0, finding)
    return _Bisection(a, b, feed, progress or (lambda text, fraction: None)).report()


def _check_sides(a: Target, b: Target, feed: Feed) -> None:
    if (a.bundle.path, a.label) == (b.bundle.path, b.label):
        raise ConfigError(f"both sides are {a.label} of {a.bundle.path}; name two runtimes, or another bundle with --b-bundle")
    first, second = ({**side.bundle.config.to_dict(), "name": ""} for side in (a, b))
    if differing := [key for key in first if first[key] != second.get(key)]:
        raise ConfigError(f"{b.bundle.path}: {differing[0]} is not that of {a.bundle.path}; tensors of two configurations do not compare")
    for side in (a, b):
        if side.runtime != ORACLE and (reason := availability(side.runtime)):
            raise RuntimeUnavailableError(f"{side.runtime}: {reason}")
    vocabulary = a.bundle.limits.vocab_size
    for tokens in (feed.prompt_BP, feed.decoded_NB):
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(f"tokens: an id is outside 0..{vocabulary - 1}, the vocabulary")


def _differing_weight(a: Target, b: Target) -> Finding | None:
    """The first parameter that two bundles hold differently, beyond what rounding to their dtypes explains."""
    if a.bundle.path == b.bundle.path:
        return None
    first, second = load_tensors(a.bundle.path), load_tensors(b.bundle.path)
    for name, value in first.items():
        other = second[name]
        u, least = _rounding(value.dtype, other.dtype)
        error = (other.double() - value.double()).abs()
        over = error - (u * (1 + u) * value.double().abs() + least)
        if not (over <= 0).all():
            index = tuple(int(axis) for axis in torch.unravel_index(over.nan_to_num(torch.inf).argmax(), over.shape))
            rms, scale = (float(part.square().mean().sqrt()) for part in (error, value.double()))
            R = rms / (u * scale) if u * scale else math.inf
            values = (float(value[index]), float(other[index]), float(value[index]))
            where = (name, name, "parameter", name.rsplit(".", 1)[-1], (name,), "weights", -1, b.label, index)
            return Finding(*where, *values, R, 1.0, float(error[index]), float(error[index] - over[index]))
    return None


def _rounding(one: torch.dtype, other: torch.dtype) -> tuple[float, float]:
    """How far rounding to the coarser of two dtypes moves a number: as a share of it, and where it is tiny."""
    if one == other:
        return 0.0, 0.0
    kinds = [torch.finfo(dtype) for dtype in (one, other)]
    return max(kind.eps / 2 for kind in kinds), max(kind.smallest_normal * kind.eps / 2 for kind in kinds)


class _Reference:
    """What a bundle's sides are measured against: the plain model in its dtype and in float64, every tensor of every step."""

    def __init__(self, bundle: Bundle, feed: Feed) -> None:
        self.model, self._feed = PlainModel(bundle), feed
        self.u = UNIT_ROUNDOFF[bundle.dtype]

    @cached_property
    def oracle(self) -> list[Step]:
        """The float64 run, with choices of its own."""
        return self.model.run(self._feed, True)

    @cached_property
    def yardstick(self) -> list[Step]:
        """The run in the model's dtype."""
        return self.model.run(self._feed, False)

    @cached_property
    def beside_yardstick(self) -> list[Step]:
        """The float64 run that makes the yardstick's choices of experts."""
        return self.following(self.yardstick)

    def following(self, steps: Sequence[Step]) -> list[Step]:
        """The float64 run that makes the choices of experts of these steps."""
        experts = {(step.number, name): value for step in steps for name, value in step.values.items() if name.endswith(".expert")}
        if all(self._is_own(number, name, value) for (number, name), value in experts.items()):
            return self.oracle
        return self.model.run(self._feed, True, experts)

    def _is_own(self, number: int, name: str, expert: Tensor) -> bool:
        """Whether the oracle would choose the same wherever tokens count."""
        step = self.oracle[number]
        mask = token_mask(expert, step.counts_BT)
        return torch.equal(expert[mask], step.values[name][mask])


class _Side:
    """A target, how it is run and how often it was."""

    def __init__(self, target: Target, reference: _Reference, feed: Feed) -> None:
        self.target, self.reference, self._feed = target, reference, feed
        self.runs = 0
        self.plain: list[Step] = []
        self.swept: list[Step] = []
        calls = reference.model.calls
        self._probe: Probe | None = None
        if runs_graphs(target.runtime):
            self._probe = OnnxProbe(target.bundle, target.label, calls)
        elif target.runtime != ORACLE:
            self._probe = TorchProbe(target.bundle, target.runtime, calls)
        self.judge = Judge(reference.model, target.runtime)
        self.followed: list[Step] = []

    @property
    def is_oracle(self) -> bool:
        """Whether there is nothing to judge."""
        return self._probe is None

    def run(self, wanted: Wanted, last: int | None = None) -> list[Step]:
        """One run that records the wanted calls."""
        if self._probe is None:
            return self.reference.oracle
        self.runs += 1
        return self._probe.run(self._feed, wanted, last)

    def begin(self, selecting: frozenset[str]) -> list[Step]:
        """The first run, of which nothing is recorded; where the model chooses, another tells the choices, which the oracle follows."""
        self.plain = self.run(lambda number, name: False)
        told = self.run(lambda number, name: name in selecting) if selecting and not self.is_oracle else self.plain
        self.followed = self.reference.oracle if self.is_oracle else self.reference.following(told)
        return self.plain

    def at_depth(self, step: Step, call: Call | None, leaves_only: bool = False) -> list[Check]:
        """R of a call's outputs, or of the logits, beside the oracle that follows this side; choices apart."""
        if self.is_oracle:
            return []
        beside = [steps[step.number] for steps in (self.followed, self.reference.yardstick, self.reference.beside_yardstick)]
        names = ["logits"] if call is None else [name for name, leaf in call.outputs.items() if leaf or not leaves_only]
        return [self._depth(name, call, step, *beside) for name in names if not name.endswith((".expert", ".slot_position"))]

    def _depth(self, name: str, call: Call | None, step: Step, oracle: Step, yardstick: Step, beside: Step) -> Check:
        (value, _), (wanted, mask) = _counted(step, call, name), _counted(oracle, call, name)
        error, yard = distance(value, wanted, mask), distance(_counted(yardstick, call, name)[0], *_counted(beside, call, name))
        below = max(yard.rms, FLOOR_ULPS * self.reference.u * error.scale_rms)
        R = error.rms / below if below else (0.0 if not error.rms else math.inf)
        expected = float(wanted[error.index]) if error.index else math.nan
        R_limit = one_run_R("depth", self.target.bundle.dtype)
        return Check(name, call, False, R, R_limit, error.largest, math.inf, error.index, expected)


def _counted(step: Step, call: Call | None, name: str) -> tuple[Tensor, Tensor]:
    """A tensor of a step and which of its entries count."""
    if call is None:
        return step.logits_BTV, token_mask(step.logits_BTV, step.counts_BT)
    told = {output: step.after[leaf] if leaf else step.values.get(output) for output, leaf in call.outputs.items()}
    recorded = {output: value for output, value in told.items() if value is not None}
    return step.compared(call, recorded)[name]


class _Bisection:
    """One call of `bisect`."""

    def __init__(self, a: Target, b: Target, feed: Feed, progress: Progress) -> None:
        self.feed, self.progress = feed, progress
        references: dict[Any, _Reference] = {}
        for target in (a, b):
            if target.bundle.path not in references:
                references[target.bundle.path] = _Reference(target.bundle, feed)
        self.sides = [_Side(target, references[target.bundle.path], feed) for target in (a, b)]
        self.calls = references[a.bundle.path].model.calls
        self.steps = feed.pieces + len(feed.decoded_NB)

    def report(self) -> Report:
        """Search, judge, and say what was found."""
        finding = self._find()
        tensors = self.steps * (1 + sum(len(call.inputs) + len(call.outputs) for call in self.calls))
        first, second = (side.target.label for side in self.sides)
        return Report(first, second, tensors, max(side.runs for side in self.sides), finding)

    def _find(self) -> Finding | None:
        self.progress("first run", 0.0)
        bad = self._first_bad_step()
        if bad is not None:
            number, last = bad
            suspect = self._search(number, last)
            if (finding := self._sweep(number)) is not None:
                return finding
            if not self._still_bad(number, last):
                return self._alone(number, suspect) or self._unrecorded(number)
        self.progress("every op of every step", 0.9)
        return self._sweep(self.steps - 1)

    def _first_bad_step(self) -> tuple[int, int] | None:
        """The first step whose logits or states are far out, and the index of the first call whose are; all calls for the logits."""
        selecting = frozenset(call.name for call in self.calls if call.op in SELECTING)
        first = [side.begin(selecting) for side in self.sides]
        for number in range(self.steps):
            found = [self._first_bad_call(side, steps[number]) for side, steps in zip(self.sides, first, strict=True)]
            if places := [place for place in found if place is not None]:
                return number, min(places)
        return None

    def _first_bad_call(self, side: _Side, step: Step) -> int | None:
        for place, call in enumerate((*self.calls, None)):
            if not all(check.passed for check in side.at_depth(step, call, leaves_only=True)):
                return place
        return None

    def _search(self, number: int, last: int) -> int:
        """The first call of a step, up to `last`, whose outputs are far out, by halving."""
        good, bad = -1, last
        while bad - good > 1:
            middle = (good + bad) // 2
            self.progress(f"{self.feed.label(number)}, op {middle + 1} of {len(self.calls)}", 0.1 + 0.7 * (1 - (bad - good) / (last + 1)))
            if any(self._is_bad(side, side.run(self._just(number, middle), number), number, middle) for side in self.sides):
                bad = middle
            else:
                good = middle
        return bad

    def _just(self, number: int, place: int) -> Wanted:
        """Records one call of one step; nothing, for the logits, which every run tells."""
        name = self.calls[place].name if place < len(self.calls) else None
        return lambda step, call: step == number and call == name

    def _is_bad(self, side: _Side, steps: Sequence[Step], number: int, place: int) -> bool:
        """Whether the outputs of a call, or the logits, are far out."""
        return not all(check.passed for check in side.at_depth(steps[number], (*self.calls, None)[place]))

    def _still_bad(self, number: int, place: int) -> bool:
        """Whether what was far out is so too when everything is recorded."""
        return any(self._is_bad(side, side.swept, number, place) for side in self.sides)

    def _sweep(self, last: int) -> Finding | None:
        """Record every op up to a step and judge each by itself."""
        self.progress("every op on its own inputs", 0.85)
        for side in self.sides:
            side.swept = side.run(lambda number, name: True, last)
        for number in range(last + 1):
            checks = [(self._place(check), side, check) for side in self.sides if (check := self._failure(side, number)) is not None]
            if checks:
                _, side, check = min(checks, key=lambda item: item[0])
                return self._finding(side, number, check)
        return None

    def _failure(self, side: _Side, number: int) -> Check | None:
        return None if side.is_oracle else next(side.judge.failures(side.swept[number]), None)

    def _place(self, check: Check) -> tuple[int, int]:
        """Where a tensor comes in the order of execution."""
        names = [call.name for call in self.calls]
        return (len(names) if check.call is None else names.index(check.call.name)), int(not check.between)

    def _alone(self, number: int, place: int) -> Finding | None:
        """What the search found, from runs that record it alone; None where it is right in them."""
        for side in self.sides:
            side.swept = side.run(self._just(number, place), number)
        return self._worst(number, [(*self.calls, None)[place]])

    def _unrecorded(self, number: int) -> Finding | None:
        """What is off only while nothing is recorded: no op, but what the session does around them."""
        for side in self.sides:
            side.swept = side.plain
        return self._worst(number, [*self.calls, None], "session")

    def _worst(self, number: int, calls: Sequence[Call | None], op: str = "") -> Finding | None:
        """The tensor that is furthest out in what was run last: of several calls, among the states and logits."""
        found = [
            (check, side)
            for side in self.sides
            for call in calls
            for check in side.at_depth(side.swept[number], call, leaves_only=len(calls) > 1)
            if not check.passed
        ]
        if not found:
            return None
        check, side = max(found, key=lambda item: math.inf if math.isnan(item[0].R) else item[0].R)
        return self._finding(side, number, check, op)

    def _finding(self, side: _Side, number: int, check: Check, op: str = "") -> Finding:
        call, between = check.call, check.between or check.call is None
        argument = check.tensor.rpartition(".")[2].removesuffix("_in")
        reads = () if not between else call.reads[argument] if call else side.reference.model.read_at_end
        scope = "" if call is None or "." not in call.name else f"{call.name.partition(f'.{call.op}')[0]}"
        module = (scope or "model") if between or call is None else call.module(side.target.bundle.config)
        a, b = (_value(one.swept[number], check) for one in self.sides)
        return Finding(
            tensor=check.tensor,
            module=module,
            op=op or ("model" if between or call is None else call.op),
            output=check.tensor.rsplit(".", 1)[-1],
            reads=reads,
            step=self.feed.label(number),
            step_number=number,
            runtime=side.target.label,
            index=check.index,
            a=a,
            b=b,
            expected=check.expected,
            R=None if check.tensor.endswith(".expert") else check.R,
            R_limit=check.R_limit,
            error=check.largest,
            limit=check.limit,
        )


def _value(step: Step, check: Check) -> float | None:
    """The value of a side where the error is largest; None where it recorded none."""
    if check.call is None:
        tensor: Tensor | None = step.logits_BTV
    elif check.between:
        tensor = step.values.get(check.tensor)
    else:
        tensor = _counted(step, check.call, check.tensor)[0]
    return None if tensor is None or len(check.index) != tensor.dim() else float(tensor[check.index])
