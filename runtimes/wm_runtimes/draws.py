"""Random token draws and what a runtime answers: prefill of unequal prompts, whole or in two pieces, then decode steps. Needs no torch.

B rows, T tokens of a whole row (prompt and decoded), P longest prompt, S selected tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wm_graph.errors import InputError
from wm_runtimes.session import Session

Array = np.ndarray[Any, np.dtype[Any]]
Choices = Mapping[str, Array]
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class Draws:
    """Rows of tokens that are run together: row b is a prompt of valid_B[b] tokens, then `steps` single tokens, then padding.

    Attributes:
        tokens_BT: the rows, int64; T = longest prompt + steps.
        valid_B: prompt lengths.
        steps: decode steps.
        cut: tokens of every prompt that are fed in a call of their own, fewer than the shortest has; 0 for prompts in one piece.
    """

    tokens_BT: Array
    valid_B: Array
    steps: int
    cut: int = 0

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


def make_draws(vocab_size: int, draws: int, seed: int, longest_prompt: int, steps: int) -> list[Draws]:
    """At least `draws` random rows, in groups of equal size; the first two have prompts of the longest length and of 1.

    The last row of a group of three or more has the longest prompt too: padding at the end of the flat tokens would hide a lost rest. Every
    second group is fed in two pieces.

    Raises:
        InputError: a count is out of range.
    """
    for name, value, least in (("draws", draws, 1), ("longest_prompt", longest_prompt, 1), ("decode_steps", steps, 0)):
        if value < least:
            raise InputError(f"parity: {name} is {value}, expected at least {least}")
    length = longest_prompt + steps
    rows = min(8, draws, max(1, _LOGITS_AT_ONCE // (length * vocab_size)))
    generator = np.random.default_rng(seed)
    groups = -(-draws // rows)
    valid_GB = generator.integers(1, longest_prompt + 1, (groups, rows))
    valid_GB.flat[:2] = (longest_prompt, 1)[: valid_GB.size]
    if rows > 2:
        valid_GB[:, -1] = longest_prompt
    tokens_GBT = generator.integers(0, vocab_size, (groups, rows, length))
    cut_G = np.zeros(groups, np.int64)
    if longest_prompt > 1:
        valid_GB[1::2] = np.maximum(valid_GB[1::2], max(2, longest_prompt // 2))
        cut_G[1::2] = generator.integers(1, valid_GB[1::2].min(1))
    made = [Draws(tokens_BT, valid_B, steps, int(cut)) for tokens_BT, valid_B, cut in zip(tokens_GBT, valid_GB, cut_G, strict=True)]
    for group in made:
        group.tokens_BT[~group.mask_BT] = 0
    return made


def run_draws(runner: Runner, draws: Draws) -> Trace:
    """Feed draws to a runner: the prompts in one piece or two, then the decode steps of all rows together."""
    valid_B, rows = draws.valid_B, np.arange(len(draws.valid_B))
    prompt_BP = draws.tokens_BT[:, : valid_B.max()]
    pieces = [_feed(runner.prefill, prompt_BP[:, : draws.cut], np.full_like(valid_B, draws.cut))] if draws.cut else []
    pieces.append(_feed(runner.extend if draws.cut else runner.prefill, prompt_BP[:, draws.cut :], valid_B - draws.cut))
    parts = [{name: np.concatenate([piece[name] for piece in pieces], 1) for name in pieces[0]}]
    seconds = []
    for step in range(draws.steps):
        start = time.perf_counter()
        logits_BV, choices = runner.decode(draws.tokens_BT[rows, valid_B + step])
        seconds.append(time.perf_counter() - start)
        parts.append({"logits": logits_BV[:, None], **by_token(choices, (len(rows), 1))})
    aligned = {name: _align(draws, [part[name] for part in parts]) for name in parts[0]}
    logits_BTV = aligned.pop("logits")
    return Trace(logits_BTV, aligned, tuple(seconds))


def _feed(feed: Callable[[Array, Array, Array], tuple[Array, Choices]], tokens_BT: Array, valid_B: Array) -> dict[str, Array]:
    """What a runner tells of every token of some pieces of prompts."""
    select_BT = np.minimum(np.arange(tokens_BT.shape[1]), valid_B[:, None] - 1)
    logits_BTV, choices = feed(tokens_BT, valid_B, select_BT)
    return {"logits": logits_BTV, **by_token(choices, tokens_BT.shape)}


def by_token(choices: Choices, shape: tuple[int, ...]) -> Choices:
    """Choices of a router, which are flat over tokens and what each chooses side by side, as [B, T, R, k]; others as they are."""
    return {name: value.reshape(*shape, -1, value.shape[-1]) if value.ndim == 2 else value for name, value in choices.items()}


def _align(draws: Draws, parts: list[Array]) -> Array:
    """Prefill values [B, P, ...] and step values [B, 1, ...] -> [B, T, ...] in the order of each row's tokens."""
    rows = np.arange(len(draws.valid_B))
    out = np.zeros((*draws.tokens_BT.shape, *parts[0].shape[2:]), parts[0].dtype)
    prompt_BP = np.arange(parts[0].shape[1]) < draws.valid_B[:, None]
    out[:, : prompt_BP.shape[1]][prompt_BP] = parts[0][prompt_BP]
    for step, part in enumerate(parts[1:]):
        out[rows, draws.valid_B + step] = part[:, 0]
    return out
