"""Random token draws and what a runtime answers: prefill of unequal prompts, whole or in two pieces, then decode steps. Needs no torch.

B rows, T tokens of a whole row (prompt and decoded), P longest prompt, S selected tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from wm_graph.errors import InputError
from wm_runtimes.session import Session

Array = np.ndarray[Any, np.dtype[Any]]
Choices = Mapping[str, Array]
_LOGITS_AT_ONCE = 2**25
_LOGITS = "logits"


@dataclass(frozen=True)
class Draws:
    """Rows of tokens that are run together: row b is a prompt of valid_B[b] tokens, then `steps` single tokens, then padding.

    Attributes:
        tokens_BT: the rows, int64; T = longest prompt of these rows + steps.
        valid_B: prompt lengths.
        steps: decode steps.
        first_B: how many tokens of each prompt are fed in a call of their own, from none to all; None for prompts in one piece.
    """

    tokens_BT: Array
    valid_B: Array
    steps: int
    first_B: Array | None = None

    @property
    def mask_BT(self) -> Array:
        """Which tokens count."""
        mask: Array = np.arange(self.tokens_BT.shape[1]) < self.valid_B[:, None] + self.steps
        return mask


@dataclass(frozen=True)
class Trace:
    """A runtime's answer to some draws, aligned with their rows.

    Attributes:
        logits_BTV: logits after every token; without meaning where the mask is false.
        choices: tap name -> what the runtime chose, or chose by, [B, T, ...]; zero where the mask is false.
        step_seconds: wall time of each decode step.
    """

    logits_BTV: Array
    choices: Choices
    step_seconds: tuple[float, ...]


class Runner(Protocol):
    """Something that can be fed draws: a session, or a run that also tells its choices."""

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """Start anew; logits [B, S, V] and the choices made [B, T, ...], those of routers [B·T·R, k]."""

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """`prefill` that goes on from where the rows are."""

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """One token per row; logits [B, V] and the choices made [B, 1, ...], those of routers [B·R, k]."""


class SessionRunner:
    """A session as a runner; it tells no choices."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        self.session.reset()
        return self.extend(tokens_BT, valid_B, select_BS)

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self.session.prefill(tokens_BT, valid_B, select=select_BS), {}

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self.session.decode(tokens_B), {}


def make_draws(
    vocab_size: int, draws: int, seed: int, longest_prompt: int, steps: int, farthest_prompt: int = 0, positions: int | None = None
) -> list[Draws]:
    """At least `draws` random rows, in groups of equal size; the first two have prompts of the longest length and of 1.

    The last row of a group of three or more has the longest prompt too: padding at the end of the flat tokens would hide a lost rest. Every
    second group is fed in two pieces, of which two rows leave one empty; no padded piece reaches beyond the end of the group's longest row.
    The last row of all has `farthest_prompt` tokens, if those are more. Rows are cut to the model's `positions`: the decode steps to half
    of them, the prompts to the rest.

    Raises:
        InputError: a count is out of range.
    """
    for name, value, least in (("draws", draws, 1), ("longest_prompt", longest_prompt, 1), ("decode_steps", steps, 0)):
        if value < least:
            raise InputError(f"parity: {name} is {value}, expected at least {least}")
    if positions is not None:
        steps = min(steps, positions // 2)
        longest_prompt, farthest_prompt = (min(length, positions - steps) for length in (longest_prompt, farthest_prompt))
    rows = min(8, draws, max(1, _LOGITS_AT_ONCE // ((longest_prompt + steps) * vocab_size)))
    generator = np.random.default_rng(seed)
    groups = -(-draws // rows)
    valid_GB = generator.integers(1, longest_prompt + 1, (groups, rows))
    valid_GB.flat[:2] = (longest_prompt, 1)[: valid_GB.size]
    if rows > 2:
        valid_GB[:, -1] = longest_prompt
    valid_GB[-1, -1] = max(valid_GB[-1, -1], farthest_prompt)
    share_G = generator.uniform(0.25, 0.75, groups)
    made = []
    for group, (valid_B, share) in enumerate(zip(valid_GB, share_G, strict=True)):
        first_B = _cut(valid_B, float(share), steps) if group % 2 else None
        tokens_BT = generator.integers(0, vocab_size, (rows, int(valid_B.max()) + steps))
        made.append(Draws(tokens_BT, valid_B, steps, first_B))
        tokens_BT[~made[-1].mask_BT] = 0
    return made


def _cut(valid_B: Array, share: float, steps: int) -> Array | None:
    """How many tokens of each prompt come first, or None where all are to come at once; shortens the prompts of rows 0 and 1 in place.

    A piece is padded to its longest row, and a session runs rows whose padding exceeds its capacity apart: two calls of every op, where
    parity counts one. So of every row the same share comes first, row 1 ends there, and row 0, of which nothing comes first, is no longer
    than what is left then.
    """
    if len(valid_B) > 2:
        valid_B[1] = min(valid_B[1], max(1, int(share * valid_B.max())))
    first_B: Array = (valid_B * share).astype(np.int64)
    first_B[0] = 0
    if len(valid_B) > 2:
        first_B[1] = valid_B[1]
    if not first_B.any():
        return None
    valid_B[0] = min(valid_B[0], max(1, valid_B[1:].max() + steps - first_B.max()))
    fits = first_B.max() + (valid_B - first_B).max() <= valid_B.max() + steps  # prompts of a token or two may be too short to be cut
    return first_B if fits else None


def run_draws(runner: Runner, draws: Draws) -> Trace:
    """Feed draws to a runner: the prompts in one piece or two, then the decode steps of all rows together."""
    valid_B, rows = draws.valid_B, np.arange(len(draws.valid_B))
    none_B = np.zeros_like(valid_B)
    edges = [none_B, valid_B] if draws.first_B is None else [none_B, draws.first_B, valid_B]
    told: dict[str, Array] = {}
    for start_B, end_B in pairwise(edges):
        feed = runner.extend if told else runner.prefill
        _place(told, draws, start_B, end_B - start_B, *_piece(feed, draws, start_B, end_B - start_B))
    seconds = []
    for step in range(draws.steps):
        start = time.perf_counter()
        logits_BV, choices = runner.decode(draws.tokens_BT[rows, valid_B + step])
        seconds.append(time.perf_counter() - start)
        _place(told, draws, valid_B + step, np.ones_like(valid_B), logits_BV[:, None], by_token(choices, (len(rows), 1)))
    return Trace(told.pop(_LOGITS), told, tuple(seconds))


def _piece(
    feed: Callable[[Array, Array, Array], tuple[Array, Choices]], draws: Draws, start_B: Array, count_B: Array
) -> tuple[Array, Choices]:
    """Logits and choices of every token of a piece of each prompt."""
    place_BP = np.arange(int(count_B.max()))
    tokens_BP = np.take_along_axis(draws.tokens_BT, np.minimum(start_B[:, None] + place_BP, draws.tokens_BT.shape[1] - 1), 1)
    logits_BPV, choices = feed(tokens_BP, count_B, np.clip(place_BP, 0, np.maximum(count_B - 1, 0)[:, None]))
    return logits_BPV, by_token(choices, tokens_BP.shape)


def _place(told: dict[str, Array], draws: Draws, start_B: Array, count_B: Array, logits_BPV: Array, choices: Choices) -> None:
    """Put what was told of some tokens of each row, [B, P, ...], where they stand in the row."""
    row_N, place_N = np.nonzero(np.arange(logits_BPV.shape[1]) < count_B[:, None])
    for name, value in {_LOGITS: logits_BPV, **choices}.items():
        if name not in told:
            told[name] = np.zeros((*draws.tokens_BT.shape, *value.shape[2:]), value.dtype)
        told[name][row_N, start_B[row_N] + place_N] = value[row_N, place_N]


def by_token(choices: Choices, shape: tuple[int, ...]) -> Choices:
    """Choices of a router, which are flat over tokens and what each chooses side by side, as [B, T, R, k]; others as they are."""
    return {name: value.reshape(*shape, -1, value.shape[-1]) if value.ndim == 2 else value for name, value in choices.items()}
