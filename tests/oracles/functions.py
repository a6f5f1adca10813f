"""The functions of numbers and vectors that all parts of the model use, in float64.

D features in, O features out.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), written on each side of 0 so that the exponential cannot overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def silu(x: float) -> float:
    return x * sigmoid(x)


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


ACTIVATIONS: dict[str, Callable[[float], float]] = {"none": lambda x: x, "silu": silu, "gelu": gelu}


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def each(function: Callable[[float], float], x_D: Sequence[float] | Array) -> Array:
    """`function` of every number of a vector."""
    return np.array([function(float(x)) for x in x_D])


def linear(weight_OD: Array, x_D: Array, bias_O: Array | None = None) -> Array:
    """W x + b: every output is the product of one row of the weight with the input."""
    return weight_OD @ x_D if bias_O is None else weight_OD @ x_D + bias_O


def rms_norm(x_D: Array, weight_D: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) ⊙ weight."""
    root = math.sqrt(sum(x * x for x in x_D.tolist()) / len(x_D) + eps)
    return weight_D * x_D / root


def softmax(scores: Sequence[float]) -> list[float]:
    """exp(s) / Σ exp(s), the largest score taken off before the exponential."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def best(scores: Sequence[float], picks: int) -> list[int]:
    """Indices of the `picks` largest scores, the largest first; of equal ones the lower index first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:picks]


def group_of(head: int, heads: int, groups: int) -> int:
    """The group that a head reads: consecutive heads share one."""
    return head // (heads // groups)
