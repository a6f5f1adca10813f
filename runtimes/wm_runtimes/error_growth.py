"""How the error of the logits grows over a long decode: a prompt, then single tokens, in every runtime, eager and the float64 oracle.

The oracle takes the whole text at once, with the choices that the runtime made along it.

B rows, T tokens of a whole row, S selected tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from wm_graph.params import Params
from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF, model_limit
from wm_runtimes.bundle import Bundle
from wm_runtimes.choice_names import choice_names
from wm_runtimes.choices import EagerRunner
from wm_runtimes.draws import Array, Choices, Draws, Runner, SessionRunner, run_draws
from wm_runtimes.labels import open_labelled, runs_graphs, runtime_of, way_options
from wm_runtimes.op_parity import YARDSTICK, TellingOracle
from wm_runtimes.parity import Progress, over_limits
from wm_runtimes.selections import Verdict
from wm_runtimes.tap_runners import PromotedValues, RecordedOps

PROMPT = 32
STEPS = 512
_LOGITS_AT_ONCE = 2**26
_CHOICE = (".expert", ".score_in", ".query_in", ".logits_in")


@dataclass(frozen=True)
class GrowthRow:
    """The error of one runtime along a decode.

    Attributes:
        dtype: the model's.
        runtime: which runtime, or `YARDSTICK`.
        steps: decode steps at which the error was taken: powers of two, and the last.
        rms: rms error of the logits after each of them.
        R: rms error over eager's, pooled over these steps.
        R_limit: its limit, that of a whole model.
        choice_rate: share of choices along the whole text that differ from the oracle's, of the op with the largest.
        choice_rate_limit: its limit.
        choice_excess: worst shortfall of a choice over its score budget; at most 1.
    """

    dtype: str
    runtime: str
    steps: tuple[int, ...]
    rms: tuple[float, ...]
    R: float
    R_limit: float
    choice_rate: float
    choice_rate_limit: float
    choice_excess: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What is over its limit, in words; NaN is over every limit."""
        checks = (
            ("R", self.R, self.R_limit),
            ("differing choices", self.choice_rate, self.choice_rate_limit),
            ("choice shortfall over budget", self.choice_excess, 1.0),
        )
        return over_limits(checks)

    @property
    def passed(self) -> bool:
        """Everything is within its limit."""
        return not self.failures


def marked_steps(steps: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the last step."""
    return tuple(sorted({2**power for power in range(steps.bit_length())} | {steps}))


def measure_growth(
    bundle: Bundle,
    params: Params,
    runtimes: Sequence[str],
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    most_rows: int = 4,
) -> list[GrowthRow]:
    """Decode the same random tokens in runtimes and eager, and compare the logits after steps 1, 2, 4, ... with the oracle's.

    Args:
        bundle: an open bundle.
        params: its parameters.
        runtimes: names of runtimes that can run it.
        steps: decode steps; fewer where the model's positions end before.
        seed: of the tokens.
        progress: called with what is being done and the fraction done.
        most_rows: texts that are decoded together; fewer where the vocabulary is large.

    Returns:
        The yardstick's row, then one per runtime.
    """
    tell = progress or (lambda text, fraction: None)
    steps = min(steps, bundle.limits.max_position - PROMPT)
    rows = max(1, min(most_rows, _LOGITS_AT_ONCE // ((PROMPT + steps) * bundle.limits.vocab_size)))
    growth = _Growth(bundle, params, steps, seed, rows)
    names = (YARDSTICK, *runtimes)
    for place, name in enumerate(names):
        tell(f"{growth.draws.steps} decode steps, {name}", place / len(names))
        growth.add(name)
    return growth.rows()


class _KeptSteps:
    """A runner that keeps the logits after some decode steps, and tells none: those of all steps of a large vocabulary fill the memory."""

    def __init__(self, inner: Runner, steps: Sequence[int]) -> None:
        self._inner, self._steps = inner, frozenset(steps)
        self._step = 0
        self.logits: list[Array] = []

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        self._step, self.logits = 0, []
        logits_BSV, choices = self._inner.prefill(tokens_BT, valid_B, select_BS)
        return logits_BSV[..., :0], choices

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BSV, choices = self._inner.extend(tokens_BT, valid_B, select_BS)
        return logits_BSV[..., :0], choices

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BV, choices = self._inner.decode(tokens_B)
        self._step += 1
        if self._step in self._steps:
            self.logits.append(logits_BV)
        return logits_BV[..., :0], choices


class _Growth:
    """One call of `measure_growth`."""

    def __init__(self, bundle: Bundle, params: Params, steps: int, seed: int, rows: int) -> None:
        self.bundle, self.params = bundle, params
        tokens_BT = np.random.default_rng(seed).integers(0, bundle.limits.vocab_size, (rows, PROMPT + steps))
        self.draws = Draws(tokens_BT, np.full(rows, PROMPT), steps)
        self.marks = marked_steps(steps)
        self.choices = choice_names(bundle.config, PROMPT + steps)
        self.oracle = TellingOracle(bundle.config, params, bundle.dtype)
        self.expected_BSV, self.recorded = self._expected(None)
        self.errors: dict[str, Array] = {}
        self.verdicts: dict[str, Verdict] = {}

    def add(self, name: str) -> None:
        """Decode in one runtime, and compare."""
        logits_BSV, choices = self._decode(name)
        expected_BSV, self.verdicts[name] = self.expected_BSV, Verdict()
        if choices:
            expected_BSV, recorded = self._expected(choices)
            self.verdicts[name] = self.oracle.judge(self.draws, recorded, choices)
        self.errors[name] = np.sqrt(np.square(logits_BSV - expected_BSV).mean((0, 2)))

    def rows(self) -> list[GrowthRow]:
        """The rows, in the order in which runtimes were added."""
        scale = math.sqrt(float(np.square(self.expected_BSV).mean()))
        below = max(_pooled(self.errors[YARDSTICK]), FLOOR_ULPS * UNIT_ROUNDOFF[self.bundle.dtype] * scale)
        return [self._row(name, below) for name in self.errors]

    def _row(self, name: str, below: float) -> GrowthRow:
        limit = model_limit(self.bundle.dtype, "eager" if name == YARDSTICK else runtime_of(name))
        return GrowthRow(
            dtype=self.bundle.dtype,
            runtime=name,
            steps=self.marks,
            rms=tuple(self.errors[name].tolist()),
            R=_pooled(self.errors[name]) / below if below else (0.0 if not self.errors[name].any() else math.inf),
            R_limit=limit.R,
            choice_rate=self.verdicts[name].rate,
            choice_rate_limit=limit.choice_rate,
            choice_excess=self.verdicts[name].excess,
        )

    def _expected(self, replay: Choices | None) -> tuple[Array, dict[str, Array]]:
        """The oracle's logits after the marked steps, and what it chose and chose by."""
        index_S = PROMPT - 1 + np.array(self.marks)
        if not self.choices:
            index_BS = np.tile(index_S, (len(self.draws.valid_B), 1))
            return self.oracle.tell(self.draws, select_BS=index_BS, keep=lambda name: False)
        logits_BTV, recorded = self.oracle.tell(self.draws, replay, keep=lambda name: name.endswith(_CHOICE))
        return logits_BTV[:, index_S], recorded

    def _decode(self, name: str) -> tuple[Array, Choices]:
        """Logits [B, S, V] after the marked steps, and the choices along the text."""
        rows, length = self.draws.tokens_BT.shape
        with ExitStack() as stack:
            if name == YARDSTICK:
                runner: Runner = EagerRunner(self.bundle.config, self.params, length, self.choices)
            else:
                session = stack.enter_context(open_labelled(self.bundle, name, rows, length))
                runner = SessionRunner(session)
                if self.choices and not runs_graphs(session.runtime):
                    runner = RecordedOps(runner, self.choices, self.recorded)
                    stack.enter_context(runner.recording())
            kept = _KeptSteps(runner, self.marks)
            choices = run_draws(kept, self.draws).choices
            if self.choices and name != YARDSTICK and runs_graphs(name):
                promoted = PromotedValues(self.bundle, rows, length, self.choices, runtime_of(name), **way_options(name))
                choices = run_draws(_KeptSteps(stack.enter_context(closing(promoted)), ()), self.draws).choices
        return np.stack(kept.logits, 1).astype(np.float64), choices


def _pooled(rms: Array) -> float:
    return math.sqrt(float(np.square(rms).mean()))
