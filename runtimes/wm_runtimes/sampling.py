"""Choosing the next token from logits, in float64 numpy. V vocabulary, C candidates."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from wm_graph.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose a token.

    Attributes:
        temperature: divides the logits; 0 takes the largest logit, the lowest id on ties.
        top_k: keep this many largest logits, lower ids first on ties; 0 keeps all.
        top_p: then keep the fewest tokens whose probability reaches this sum, the one that crosses it included.

    Raises:
        InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.top_p)
        if any(isinstance(number, bool) or not isinstance(number, int | float | np.floating | np.integer) for number in numbers):
            raise InputError(f"temperature {self.temperature!r} and top_p {self.top_p!r} must be numbers")
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive finite number")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}, expected an integer of at least 0 (0 keeps all tokens)")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}, expected a number within 0 < top_p <= 1 (1 keeps all tokens)")


def row_generators(seed: int | None, rows: int) -> list[np.random.Generator]:
    """One generator per row, from (seed, row) alone, so that a row's draws do not depend on how many others there are.

    Args:
        seed: any integer of at least 0; None draws one from the operating system.
        rows: how many.

    Raises:
        InputError: the seed is no such integer.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
        raise InputError(f"seed is {seed!r}, expected an integer of at least 0, or None for a fresh one")
    entropy = np.random.SeedSequence().entropy if seed is None else int(seed)
    return [np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy, spawn_key=(row,)))) for row in range(rows)]


def sample(logits_V: Array, options: SamplingOptions, generator: np.random.Generator | None = None) -> int:
    """The next token.

    Args:
        logits_V: logits, finite or -inf.
        options: how to choose.
        generator: where the one random number comes from; unused at temperature 0.

    Raises:
        InputError: a temperature above 0 without a generator.
    """
    if options.temperature == 0.0:
        return int(np.argmax(logits_V))
    if generator is None:
        raise InputError("sampling at a temperature above 0 needs a generator; make one with row_generators")
    tokens_C, weights_C = candidates(logits_V, options)
    cumulative_C = np.cumsum(weights_C)
    index = int(np.searchsorted(cumulative_C, generator.random() * cumulative_C[-1], side="right"))
    # Rounding may put the draw on the last edge, or past tokens of weight 0.
    return int(tokens_C[min(index, int(np.flatnonzero(weights_C)[-1]))])


def candidates(logits_V: Array, options: SamplingOptions) -> tuple[Array, Array]:
    """Tokens that may be chosen, and their probabilities up to a common factor.

    Args:
        logits_V: logits, finite or -inf.
        options: temperature above 0, top_k, top_p.

    Returns:
        (tokens_C int64, weights_C float64). With top_k or top_p, most likely first.
    """
    scaled_V = logits_V.astype(np.float64)
    # Subtracting first keeps a small temperature from overflowing.
    weights_V = np.exp((scaled_V - scaled_V.max()) / options.temperature)
    vocab = len(weights_V)
    k = min(options.top_k or vocab, vocab)
    if options.top_p < 1.0:
        return _nucleus(logits_V, weights_V, k, options.top_p)
    if k == vocab:
        return np.arange(vocab), weights_V
    tokens_C = _largest(logits_V, k)
    return tokens_C, weights_V[tokens_C]


def _nucleus(logits_V: Array, weights_V: Array, k: int, p: float) -> tuple[Array, Array]:
    """The fewest most likely tokens, at most k, whose share of the k largest reaches p."""
    vocab = len(weights_V)
    total = weights_V.sum() if k == vocab else weights_V[_largest(logits_V, k)].sum()
    count = min(_FIRST_CANDIDATES, k)
    while True:
        # Few tokens hold most of the mass: sorting the whole vocabulary is the exception.
        tokens_C = _largest(logits_V, count)
        cumulative_C = np.cumsum(weights_V[tokens_C])
        if count == k or cumulative_C[-1] >= p * total:
            keep = min(int(np.searchsorted(cumulative_C, p * total, side="left")) + 1, count)
            return tokens_C[:keep], weights_V[tokens_C[:keep]]
        count = min(8 * count, k)


def _largest(logits_V: Array, k: int) -> Array:
    """Ids of the k largest logits, largest first, lower ids first on ties."""
    if k < len(logits_V):
        threshold = np.partition(logits_V, len(logits_V) - k)[len(logits_V) - k]
        tokens_C = np.flatnonzero(logits_V >= threshold)
    else:
        tokens_C = np.arange(len(logits_V))
    order = np.argsort(-logits_V[tokens_C], kind="stable")[:k]
    return tokens_C[order]
