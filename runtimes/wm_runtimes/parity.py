"""How far a runtime is from the float64 oracle, and whether that is within the limits of `tolerances.py`.

    R = rms(runtime - oracle) / max(rms(eager - oracle), a few u of the oracle's scale), pooled over random draws

Where a model chooses (experts, kept keys), a runtime's choices are judged as sets (`selections.py`), and its values are compared with an
oracle that made the same choices.

B rows, T tokens, V vocabulary, R retrieval heads, K kv heads, k picks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from wm_graph.checkpoints import load_tensors
from wm_graph.config import ModelConfig
from wm_graph.errors import BudgetError, InputError, RuntimeUnavailableError
from wm_graph.feed_forwards import product_keys
from wm_graph.oracle import oracle_forward
from wm_graph.params import CdmoeParams, Params, params_from_flat
from wm_graph.taps import Taps
from wm_graph.tolerances import FLOOR_ULPS, MOVED, UNIT_ROUNDOFF, model_limit, score_budget
from wm_runtimes import availability, open_session
from wm_runtimes.bundle import Bundle
from wm_runtimes.choice_names import choice_names, op_of, options_of
from wm_runtimes.choices import EagerRunner, TellingSession
from wm_runtimes.draws import Array, Choices, Draws, Trace, by_token, make_draws, run_draws
from wm_runtimes.json_values import json_values
from wm_runtimes.labels import runtime_of, way_options
from wm_runtimes.selections import Judgement, Verdict, judge_experts, judge_router, judge_threshold, judge_window

Progress = Callable[[str, float], None]
FARTHEST = 271  # tokens of one prompt: more than 256 positions, and several chunks
_ANY_LENGTH = 2**62  # of rows: every call that may choose


def over_limits(checks: Sequence[tuple[str, float, float]]) -> tuple[str, ...]:
    """Of (what, value, limit), those over their limits, in words; NaN is over every limit."""
    return tuple(f"{name} {value:.4g} > {limit:.4g}" for name, value, limit in checks if not value <= limit)


@dataclass(frozen=True)
class ParityRow:
    """One runtime's distance from the oracle.

    Attributes:
        runtime: which runtime.
        dtype: dtype of the bundle.
        outputs: logits compared.
        R: rms error over eager's.
        R_limit: its limit.
        max_abs: largest error of one logit.
        max_abs_limit: its limit, at the scale of these logits.
        choice_rate: share of choices that differ from the oracle's, of the op with the largest.
        choice_rate_limit: its limit.
        choice_excess: worst shortfall of a choice over its score budget; at most 1.
        tokens_per_s: tokens decoded per second, all rows together.
    """

    runtime: str
    dtype: str
    outputs: int
    R: float
    R_limit: float
    max_abs: float
    max_abs_limit: float
    choice_rate: float
    choice_rate_limit: float
    choice_excess: float
    tokens_per_s: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What is over its limit, in words; NaN is over every limit."""
        checks = (
            ("R", self.R, self.R_limit),
            ("max abs", self.max_abs, self.max_abs_limit),
            ("differing choices", self.choice_rate, self.choice_rate_limit),
            ("choice shortfall over budget", self.choice_excess, 1.0),
        )
        return over_limits(checks)

    @property
    def passed(self) -> bool:
        """Everything is within its limit, and something was compared."""
        return self.outputs > 0 and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite become null."""
        return {**json_values(asdict(self)), "passed": self.passed, "failures": list(self.failures)}


@dataclass(frozen=True)
class ParityReport:
    """Parity of a bundle's runtimes.

    Attributes:
        bundle: name of the model.
        draws: random rows per runtime.
        tokens: tokens per runtime that count.
        eager_rms: rms error of eager, R's denominator.
        scale: rms of the oracle's logits.
        rows: one per runtime.
    """

    bundle: str
    draws: int
    tokens: int
    eager_rms: float
    scale: float
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """There are rows and every one passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**json_values(asdict(self)), "passed": self.passed, "rows": [row.to_dict() for row in self.rows]}


@dataclass
class _Sums:
    """What is pooled over draws for one runtime."""

    squares: float = 0.0
    count: int = 0
    max_abs: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)

    def add(self, error_NV: Array, verdict: Verdict) -> None:
        """Pool the errors of some logits; NaN stays NaN."""
        self.squares += float(np.square(error_NV).sum())
        self.count += error_NV.size
        self.max_abs = float(np.maximum(self.max_abs, np.abs(error_NV).max(initial=0.0)))
        self.verdict = self.verdict + verdict

    @property
    def rms(self) -> float:
        """Root mean square of the errors."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan


class Oracle:
    """The float64 oracle of a bundle's weights, and its opinion about a runtime's choices.

    Args:
        cfg: the model.
        params: its parameters as stored.
        dtype: name of the stored dtype, which sets the score budgets.
    """

    def __init__(self, cfg: ModelConfig, params: Params, dtype: str) -> None:
        self.cfg, self.params, self.dtype = cfg, params, dtype

    def follow(self, draws: Draws, own: Trace, choices: Choices) -> tuple[Array, Verdict]:
        """The oracle's logits when it makes the given choices, and the verdict on them; `own` is `run(draws)`."""
        if not choices:
            return own.logits_BTV, Verdict()
        verdict = self.judge(draws, own.choices, choices)
        if not verdict.differing and verdict.passed:
            return own.logits_BTV, verdict
        # A choice in one layer moves the scores of the next: only an oracle that follows can judge them all.
        followed = self.run(draws, choices)
        return followed.logits_BTV, self.judge(draws, followed.choices, choices)

    def run(self, draws: Draws, replay: Choices | None = None, noise: float = 0.0) -> Trace:
        """Logits after every token, and the oracle's queries, logits, scores and experts; float64. For `noise` see `oracle_forward`."""
        wanted = set(choice_names(self.cfg, _ANY_LENGTH))
        wanted |= {_reason_name(name) for name in wanted}
        taps = Taps({name: torch.from_numpy(self._possible(name, value)) for name, value in (replay or {}).items()}, wanted.__contains__)
        logits_BTV, _ = oracle_forward(self.cfg, self.params, torch.from_numpy(draws.tokens_BT), taps=taps, noise=noise)
        values = {name: value.numpy() for name, value in taps.values.items()}
        return Trace(logits_BTV.numpy(), by_token(values, draws.tokens_BT.shape), ())

    def judge(self, draws: Draws, own: Choices, choices: Choices) -> Verdict:
        """The verdict on all choices of the draws, by the oracle's queries, logits and scores in `own`."""
        verdict = Verdict()
        for name, value in choices.items():
            verdict += Verdict({op_of(name): self._judge(name, own[_reason_name(name)], value, draws.mask_BT)})
        return verdict

    def _judge(self, name: str, reason: Array, value: Array, mask_BT: Array) -> Judgement:
        budget = score_budget(op_of(name), self.dtype).relative
        match op_of(name):
            case "product_key_topk":
                return judge_experts(reason, self._keys(name), value, budget, mask_BT)
            case "router_topk":
                return judge_router(reason, value, budget, mask_BT)
            case "keep_window_attention":
                return judge_window(reason, value, self.cfg.keep_window, budget, mask_BT)
            case _:
                return judge_threshold(reason, value, self.cfg.dma_ratio or None, budget, mask_BT)

    def _possible(self, name: str, value: Array) -> Array:
        """Choices that can be replayed: experts out of range, which the judgement refuses, are brought back into it."""
        return np.clip(value, 0, options_of(self.cfg, name) - 1) if name.endswith(".expert") else value

    def _keys(self, name: str) -> Array:
        feed_forward = self.params.layers[int(name.split(".")[1])].feed_forward
        assert isinstance(feed_forward, CdmoeParams)
        return product_keys(self.cfg, feed_forward).detach().double().numpy()


def _reason_name(name: str) -> str:
    """The tap by which a choice is made: its own, where that is what is told."""
    reason = {"product_key_topk": "query_in", "router_topk": "logits_in"}.get(op_of(name))
    return name.removesuffix("expert") + reason if reason else name


def measure_parity(
    bundle: Bundle,
    runtimes: Sequence[str],
    draws: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    longest_prompt: int = 79,
    farthest_prompt: int = 0,
    decode_steps: int = 8,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParityReport:
    """Run the same random tokens through runtimes, eager and the float64 oracle, prefill and decode, and compare all logits.

    Args:
        bundle: an open bundle.
        runtimes: runtimes, or labels such as `onnxruntime-cpu:model.onnx`.
        draws: random rows, of prompts from 1 to `longest_prompt` tokens.
        seed: of the draws.
        progress: called with what is being done and the fraction done.
        longest_prompt: tokens of the longest prompt; an odd number, times 8 rows, leaves a rest to kernels that take 16 tokens at a time.
        farthest_prompt: tokens of the last prompt, if those are more.
        decode_steps: single tokens after each prompt; as prompts, fewer where the model has fewer positions.
        options: runtime, as in `runtimes` -> options of its session.

    Raises:
        InputError: no runtime is named, one is unknown, or a count is out of range.
        RuntimeUnavailableError: a runtime cannot run here.
        BudgetError: nothing was compared.
    """
    if not runtimes:
        raise InputError("parity: no runtime named; name at least one")
    for name in runtimes:
        if reason := availability(runtime_of(name)):
            raise RuntimeUnavailableError(f"{name}: {reason}")
    limits = bundle.limits
    groups = make_draws(limits.vocab_size, draws, seed, longest_prompt, decode_steps, farthest_prompt, limits.max_position)
    params = params_from_flat(bundle.config, load_tensors(bundle.path))
    measurement = Measurement(bundle, params, groups, list(dict.fromkeys(runtimes)), options or {})
    return measurement.run(progress or (lambda text, fraction: None))


class Measurement:
    """One call of `measure_parity`: its runners, and the sums they fill group by group."""

    def __init__(
        self, bundle: Bundle, params: Params, groups: list[Draws], runtimes: list[str], options: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.bundle, self.params, self.groups, self.runtimes, self.options = bundle, params, groups, runtimes, options
        self.batch, self.capacity = len(groups[0].valid_B), max(group.tokens_BT.shape[1] for group in groups)
        self.names = choice_names(bundle.config, self.capacity)
        self.oracle = Oracle(bundle.config, params, bundle.dtype)
        self.u = UNIT_ROUNDOFF[bundle.dtype]
        self.moved, self.eager, self.sums = _Sums(), _Sums(), {name: _Sums() for name in runtimes}
        self.scale_squares = 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in runtimes}
        self.open: dict[str, TellingSession] = {}

    def run(self, progress: Progress) -> ParityReport:
        """Measure every group, then divide."""
        yardstick = EagerRunner(self.bundle.config, self.params, self.capacity, self.names)
        stages = len(self.groups) * (1 + len(self.runtimes))
        try:
            for index, draws in enumerate(self.groups):
                done = index * (1 + len(self.runtimes))
                traces = {}
                for place, name in enumerate(self.runtimes):
                    progress(f"{name}, {index + 1} of {len(self.groups)}", (done + place) / stages)
                    traces[name] = self.trace(name, draws)
                progress(f"oracle and eager, {index + 1} of {len(self.groups)}", (done + len(self.runtimes)) / stages)
                own, eager = self.oracle.run(draws), run_draws(yardstick, draws)
                moved = self.oracle.run(draws, {name: own.choices[name] for name in self.names}, self.u)
                self.moved.add((moved.logits_BTV - own.logits_BTV)[draws.mask_BT], Verdict())
                self._add(self.eager, draws, own, eager)
                self.scale_squares += float(np.square(own.logits_BTV[draws.mask_BT]).sum())
                for name, trace in traces.items():
                    self._add(self.sums[name], draws, own, trace)
                    self.seconds[name] += trace.step_seconds
        finally:
            for telling in self.open.values():
                telling.close()
        return self._report()

    def trace(self, name: str, draws: Draws) -> Trace:
        """A runtime's answer. It is open from its first draws to its last, so that with one group no two hold weights at once."""
        if name not in self.open:
            options = self._options(name)
            session = open_session(self.bundle, runtime_of(name), self.batch, self.capacity, **options)
            self.open[name] = TellingSession(session, self.names, options)
        trace = self.open[name].run(draws)
        if draws is self.groups[-1]:
            self.open.pop(name).close()
        return trace

    def _options(self, name: str) -> dict[str, Any]:
        return {**way_options(name), **self.options.get(name, {})}

    def _add(self, sums: _Sums, draws: Draws, own: Trace, trace: Trace) -> None:
        expected_BTV, verdict = self.oracle.follow(draws, own, trace.choices)
        mask_BT = draws.mask_BT
        sums.add(trace.logits_BTV[mask_BT].astype(np.float64) - expected_BTV[mask_BT], verdict)

    def _report(self) -> ParityReport:
        if not self.eager.count or not all(sums.count for sums in self.sums.values()):
            raise BudgetError("parity: no outputs in common, nothing was compared")
        scale = math.sqrt(self.scale_squares / self.eager.count)
        # NaN of eager stays NaN; an eager that is further off than its arithmetic can be is no yardstick, and its own R says so.
        below = float(np.maximum(np.minimum(self.eager.rms, MOVED[self.bundle.dtype] * self.moved.rms), FLOOR_ULPS * self.u * scale))
        rows = tuple(self._row(name, sums, below, scale) for name, sums in self.sums.items())
        tokens = sum(int(draws.mask_BT.sum()) for draws in self.groups)
        return ParityReport(self.bundle.name, self.batch * len(self.groups), tokens, self.eager.rms, scale, rows)

    def _row(self, name: str, sums: _Sums, below: float, scale: float) -> ParityRow:
        limit = model_limit(self.bundle.dtype, runtime_of(name))
        seconds = self.seconds[name]
        return ParityRow(
            runtime=name,
            dtype=self.bundle.dtype,
            outputs=sums.count,
            R=sums.rms / below if below else (0.0 if sums.rms == 0 else math.inf),
            R_limit=limit.R,
            max_abs=sums.max_abs,
            max_abs_limit=limit.max_abs_at(scale, self.moved.max_abs),
            choice_rate=sums.verdict.rate,
            choice_rate_limit=limit.choice_rate,
            choice_excess=sums.verdict.excess,
            tokens_per_s=self.batch / median(seconds) if seconds else 0.0,
        )
