"""Rotary position embedding: pair j of a vector's features turns by position · frequency_j.

F rotated pairs, P features.
"""

import math
from dataclasses import dataclass

import numpy as np

from oracles.functions import Array


@dataclass(frozen=True)
class Scaling:
    """How frequencies change for texts longer than those of the training: none, linear, llama3 or dynamic."""

    kind: str = "none"
    factor: float = 1.0
    original: int = 1
    low: float = 1.0
    high: float = 4.0


def angles(position: int, pairs: int, theta: float, scaling: Scaling, length: int) -> tuple[Array, Array]:
    """(cos_F, sin_F) of one position in a text of `length` tokens."""
    turns = [position * frequency(pair, pairs, theta, scaling, length) for pair in range(pairs)]
    return np.array([math.cos(turn) for turn in turns]), np.array([math.sin(turn) for turn in turns])


def frequency(pair: int, pairs: int, theta: float, scaling: Scaling, length: int) -> float:
    """theta^(-j / F), radians per token, scaled.

    linear: positions are divided by the factor (arXiv:2306.15595). llama3: a wave longer than original / low is stretched by the factor,
    one shorter than original / high is left alone, between the two the frequencies blend. dynamic: once the text is longer than the
    original length, theta grows so that the slowest pair turns as if positions were divided by factor · length / original - (factor - 1)
    (NTK).
    """
    if scaling.kind == "dynamic" and length > scaling.original and pairs > 1:
        stretch = scaling.factor * length / scaling.original - (scaling.factor - 1)
        theta = theta * stretch ** (2 * pairs / (2 * pairs - 2))
    plain = theta ** (-pair / pairs)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        wave = 2 * math.pi / plain  # tokens per turn
        if wave < scaling.original / scaling.high:
            return plain
        if wave > scaling.original / scaling.low:
            return plain / scaling.factor
        kept = (scaling.original / wave - scaling.low) / (scaling.high - scaling.low)
        return kept * plain + (1 - kept) * plain / scaling.factor
    return plain


def rotate(x_P: Array, cos_F: Array, sin_F: Array) -> Array:
    """Pair j is features j and F + j, one complex number, turned by its angle. Features from 2F on stay."""
    out_P, pairs = x_P.copy(), len(cos_F)
    for j in range(pairs):
        turned = complex(x_P[j], x_P[pairs + j]) * complex(cos_F[j], sin_F[j])
        out_P[j], out_P[pairs + j] = turned.real, turned.imag
    return out_P
