"""Attention of one query over the cells of a cache: which it sees, and what it makes of them.

P head dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from oracles.functions import Array, softmax


class Cell(NamedTuple):
    """What is kept of one token for one head."""

    position: int
    score: float  # added to q · k / sqrt(P), and the cell's rank
    key_P: Array
    value_P: Array


def mixture(query_P: Array, cells: Sequence[Cell]) -> Array:
    """Σ softmax(q · k / sqrt(P) + score) · v over the cells; zeros where there is none."""
    if not cells:
        return 0 * query_P
    weights = softmax([float(query_P @ cell.key_P) / math.sqrt(len(query_P)) + cell.score for cell in cells])
    return sum((weight * cell.value_P for weight, cell in zip(weights, cells, strict=True)), 0 * query_P)


def best_ranked(seen: Sequence[Cell], window: int) -> list[Cell]:
    """The cells that a window keeps of all that were ever seen: larger score first, of equal ones the later position; by position."""
    ranked = sorted(seen, key=lambda cell: (-cell.score, -cell.position))
    return sorted(ranked[:window], key=lambda cell: cell.position)


def visible(seen: Sequence[Cell], scoring: str, ratio: float) -> list[Cell]:
    """The cells that a query sees by their scores, with what is added.

    additive: all, with their scores. binary: those of score 1 and more, adding nothing. ratio: of n cells all but those whose score is
    below the m-th smallest, m = floor(ratio · n), with their scores; equal ones stay together.
    """
    if scoring == "binary":
        return [cell._replace(score=0.0) for cell in seen if cell.score >= 1]
    least = -math.inf
    if scoring == "ratio" and (m := math.floor(ratio * len(seen))) >= 1:
        least = sorted(cell.score for cell in seen)[m - 1]
    return [cell for cell in seen if cell.score >= least]
