"""How far every op of a model is from the float64 oracle, inside the model: what parity measures of logits, measured of every value.

    R = rms(runtime - oracle) / max(rms(eager - oracle), a few u of the value's scale)

for every op output and recurrent state, over the same draws; the oracle makes the runtime's choices where the model chooses. An op's R
pools its outputs over all layers, each error divided by the scale of its value, so that a large layer hides no small one.

B rows, T tokens, S selected tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from wm_graph.oracle import oracle_forward
from wm_graph.params import Params
from wm_graph.taps import Taps
from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF, model_limit, op_limit
from wm_runtimes.bundle import Bundle
from wm_runtimes.choice_names import choice_names
from wm_runtimes.choices import EagerRunner
from wm_runtimes.draws import Array, Choices, Draws, Runner, SessionRunner, by_token, make_draws, run_draws
from wm_runtimes.labels import open_labelled, runs_graphs, runtime_of, way_options
from wm_runtimes.parity import Oracle, Progress
from wm_runtimes.tap_runners import STATE, PromotedValues, RecordedOps, StatesApart, compared_names, op_of, rotated_pairs

YARDSTICK = "eager, functional"
LOGITS = "logits"
BINS = np.arange(-12.0, 4.25, 0.25)  # edges of log10(|error| / scale); what is smaller or larger counts in the first or last bin


@dataclass(frozen=True)
class Distribution:
    """How errors are spread.

    Attributes:
        counts: values whose log10(|error| / rms of the oracle's) lies in each bin of `BINS`.
        exact: values without any error.
        not_finite: values that are NaN or infinite.
    """

    counts: tuple[int, ...]
    exact: int
    not_finite: int


@dataclass(frozen=True)
class TapRow:
    """One value of the model, such as `layers.3.rope.y`, in one runtime.

    Attributes:
        name: its tap.
        place: in the order in which values are computed.
        R: rms error over eager's.
        ulps: largest error in u of the largest |value|.
    """

    name: str
    place: int
    R: float
    ulps: float


@dataclass(frozen=True)
class OpRow:
    """One op in one runtime at one dtype, over all layers.

    Attributes:
        dtype: the model's.
        runtime: which runtime.
        op: name without `wm::`, or `logits`.
        values: numbers compared.
        R: rms error over eager's, each in units of its value's scale.
        R_limit: the limit of R, the pooled one and each tap's; that of a whole model.
        ulps: largest error of any value, in u of its tap's largest |value|.
        taps: one per output and layer, in the order in which they run.
        spread: of the errors.
    """

    dtype: str
    runtime: str
    op: str
    values: int
    R: float
    R_limit: float
    ulps: float
    taps: tuple[TapRow, ...]
    spread: Distribution

    @property
    def over(self) -> tuple[TapRow, ...]:
        """The taps past the limit; NaN is."""
        return tuple(tap for tap in self.taps if not self.R_limit >= tap.R)

    @property
    def passed(self) -> bool:
        """Something was compared, and all of it is within the limit."""
        return self.values > 0 and self.R_limit >= self.R and not self.over


class TellingOracle(Oracle):
    """The float64 oracle that tells what it records."""

    def tell(
        self, draws: Draws, replay: Choices | None = None, *, select_BS: Array | None = None, keep: Callable[[str], bool] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Logits [B, S, V], and name -> value of every op, [B, T, ...] but for states; rows end where their tokens do.

        Args:
            draws: the rows.
            replay: choices to make.
            select_BS: tokens whose logits are wanted; None for all. The last layer chooses no experts for others.
            keep: which names to tell, a predicate; None for all, inputs of choices included.
        """
        possible = {name: torch.from_numpy(self._possible(name, value)) for name, value in (replay or {}).items()}
        taps = Taps(possible, keep or (lambda name: True))
        tokens_BT, valid_B = torch.from_numpy(draws.tokens_BT), torch.from_numpy(draws.valid_B + draws.steps)
        select = None if select_BS is None else torch.from_numpy(select_BS)
        logits_BSV, _ = oracle_forward(self.cfg, self.params, tokens_BT, None, valid_B, select, taps=taps)
        values = {name: value.numpy() for name, value in taps.values.items()}
        states = {name: value for name, value in values.items() if name.endswith(STATE)}
        return logits_BSV.numpy(), values if select_BS is not None else {**by_token(values, draws.tokens_BT.shape), **states}


@dataclass
class _Sums:
    """What is pooled over draws for one value of one runtime."""

    squares: float = 0.0
    count: int = 0
    largest: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(len(BINS) - 1, np.int64))
    exact: int = 0
    not_finite: int = 0

    def add(self, error: Array, scale: float) -> None:
        """Pool some errors; NaN stays NaN."""
        size = np.abs(error.astype(np.float64)).ravel()
        self.squares += float(np.square(size).sum())
        self.count += size.size
        self.largest = float(np.maximum(self.largest, size.max(initial=0.0)))
        finite = size[np.isfinite(size)]
        erring = finite[finite > 0]
        self.exact += finite.size - erring.size
        self.not_finite += size.size - finite.size
        self.counts += np.histogram(np.clip(np.log10(erring / (scale or 1.0)), BINS[0], BINS[-1]), BINS)[0]

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


def measure_ops(
    bundle: Bundle,
    params: Params,
    runtimes: Sequence[str],
    draws: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    longest_prompt: int = 55,
    decode_steps: int = 8,
) -> list[OpRow]:
    """Run the same random tokens through runtimes, eager and the oracle, and compare every op output, recurrent states at the end.

    Args:
        bundle: an open bundle.
        params: its parameters.
        runtimes: names of runtimes that can run it.
        draws: random rows; with fewer than 8, the R of a single state is a matter of luck.
        seed: of the draws.
        progress: called with what is being done and the fraction done.
        longest_prompt: tokens of the longest prompt; odd, as in `measure_parity`.
        decode_steps: single tokens after each prompt; as prompts, fewer where the model has fewer positions.

    Raises:
        InputError: a count is out of range.
        BundleError: a graph names its values otherwise.
    """
    tell = progress or (lambda text, fraction: None)
    limits = bundle.limits
    groups = make_draws(limits.vocab_size, draws, seed, longest_prompt, decode_steps, positions=limits.max_position)
    comparison = _Comparison(bundle, params, groups[0], list(runtimes))
    for index, group in enumerate(groups):
        for place, name in enumerate(comparison.sums):
            tell(f"every op, {name}", (index + place / len(comparison.sums)) / len(groups))
            comparison.add(name, group)
    comparison.close()
    return comparison.rows()


class _Comparison:
    """One call of `measure_ops`: its runners, and the sums they fill group by group."""

    def __init__(self, bundle: Bundle, params: Params, draws: Draws, runtimes: list[str]) -> None:
        self.bundle, self.oracle = bundle, TellingOracle(bundle.config, params, bundle.dtype)
        batch, capacity = draws.tokens_BT.shape
        self.choices = choice_names(bundle.config, capacity)
        self.group, self.logits, self.recorded = draws, *self.oracle.tell(draws)
        self.taps = (*compared_names(self.recorded), LOGITS)
        self._open_sessions = ExitStack()
        self.runners: dict[str, Runner] = {YARDSTICK: self._recorded(EagerRunner(bundle.config, params, capacity, ()))}
        self.runners |= {name: self._runner(name, batch, capacity) for name in runtimes}
        self.sums = {name: {tap: _Sums() for tap in self.taps} for name in self.runners}
        self.scales = {tap: _Sums() for tap in self.taps}

    def add(self, name: str, draws: Draws) -> None:
        """Run one group in one runtime."""
        if draws is not self.group:
            self.group, self.logits, self.recorded = draws, *self.oracle.tell(draws)
        own = {**self.recorded, LOGITS: self.logits}
        if name == YARDSTICK:
            for tap in self.taps:
                self.scales[tap].add(self._counted(tap, own[tap]), 1.0)
        told = self._run(self.runners[name])
        chosen = {choice: told[choice] for choice in self.choices}
        expected = own
        if chosen:
            logits_BTV, recorded = self.oracle.tell(draws, chosen)
            expected = {**recorded, LOGITS: logits_BTV}
        for tap in self.taps:
            error = self._counted(tap, told[tap]).astype(np.float64) - self._counted(tap, expected[tap])
            self.sums[name][tap].add(error, _rms(self._counted(tap, own[tap])))

    def close(self) -> None:
        """Close the sessions."""
        self._open_sessions.close()

    def rows(self) -> list[OpRow]:
        """The rows of every runtime, ops in the order in which they first run."""
        ops: dict[str, list[str]] = {}
        for tap in self.taps:
            ops.setdefault(op_of(tap), []).append(tap)
        return [self._row(name, op, taps) for name in self.runners if name != YARDSTICK for op, taps in ops.items()]

    def _runner(self, name: str, batch: int, capacity: int) -> Runner:
        """A runtime that tells every value."""
        if runs_graphs(name):
            promoted = PromotedValues(self.bundle, batch, capacity, self._names(), runtime_of(name), **way_options(name))
            return self._open_sessions.enter_context(closing(promoted))
        return self._recorded(SessionRunner(self._open_sessions.enter_context(open_labelled(self.bundle, name, batch, capacity))))

    def _recorded(self, inner: Runner) -> Runner:
        return RecordedOps(inner, self._names(), self.recorded, rotated_pairs(self.recorded))

    def _names(self) -> tuple[str, ...]:
        return (*self.taps[:-1], *self.choices)

    def _run(self, runner: Runner) -> dict[str, Array]:
        apart = StatesApart(runner)
        with runner.recording() if isinstance(runner, RecordedOps) else nullcontext():
            trace = run_draws(apart, self.group)
        return {LOGITS: trace.logits_BTV, **trace.choices, **apart.states}

    def _counted(self, tap: str, value: Array) -> Array:
        """The part of a value that has a meaning: all of a state, the tokens that count of others."""
        return value if tap.endswith(STATE) else value[self.group.mask_BT]

    def _row(self, name: str, op: str, taps: list[str]) -> OpRow:
        dtype = self.bundle.dtype
        # Some ops work in float32 whatever the model's dtype.
        u = UNIT_ROUNDOFF[dtype if op == LOGITS else op_limit(op, dtype, runtime_of(name)).dtype]
        sums, eager = ({tap: self.sums[who][tap] for tap in taps} for who in (name, YARDSTICK))
        rows = tuple(self._tap_row(tap, sums[tap], eager[tap], u) for tap in taps)
        below = max(self._pooled(eager), FLOOR_ULPS * u)
        return OpRow(
            dtype=dtype,
            runtime=name,
            op=op,
            values=sum(part.count for part in sums.values()),
            R=self._pooled(sums) / below,
            R_limit=model_limit(dtype, runtime_of(name)).R,
            ulps=float(np.max([row.ulps for row in rows])),
            taps=rows,
            spread=_spread(sums.values()),
        )

    def _tap_row(self, tap: str, sums: _Sums, eager: _Sums, u: float) -> TapRow:
        below = max(eager.rms, FLOOR_ULPS * u * self.scales[tap].rms)
        return TapRow(tap, self.taps.index(tap), _quotient(sums.rms, below), _quotient(sums.largest, u * self.scales[tap].largest))

    def _pooled(self, sums: Mapping[str, _Sums]) -> float:
        """The rms of all errors, each in units of its value's scale."""
        squares = sum(part.count * _quotient(part.rms, self.scales[tap].rms) ** 2 for tap, part in sums.items())
        return math.sqrt(squares / sum(part.count for part in sums.values()))


def _quotient(error: float, scale: float) -> float:
    """error / scale; without a scale, 0 for no error and infinity for any."""
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def _rms(value: Array) -> float:
    return math.sqrt(float(np.square(value.astype(np.float64)).mean())) if value.size else 0.0


def _spread(sums: Iterable[_Sums]) -> Distribution:
    parts: list[_Sums] = list(sums)
    counts = np.sum([part.counts for part in parts], axis=0)
    return Distribution(tuple(counts.tolist()), sum(part.exact for part in parts), sum(part.not_finite for part in parts))
