"""The experts of one token: how they are chosen, and what their sum is.

D model width, d half a query, J sub-keys per half (E = J² experts), R retrieval heads, E experts, k picks, I hidden width of an expert,
F = 2I where experts are gated (gate first), else I.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from oracles.functions import ACTIVATIONS, Array, best, softmax

Experts = NDArray[np.int64]


def half_scores(query_2d: Array, keys_J2d: Array) -> tuple[list[float], list[float]]:
    """Products of either half of a query with that half of every sub-key."""
    x_J, y_J = ([float(query_2d[half] @ key_2d[half]) for key_2d in keys_J2d] for half in (0, 1))
    return x_J, y_J


def best_pairs(x_J: Sequence[float], y_J: Sequence[float], picks: int) -> tuple[list[float], list[int]]:
    """(weights, experts): expert i · J + j has score x_i + y_j; every one of the J² is looked at. Weights are the picks' softmax."""
    scores = [x + y for x in x_J for y in y_J]
    experts = best(scores, picks)
    return softmax([scores[e] for e in experts]), experts


def route(logits_E: Sequence[float], picks: int, normalize: bool) -> tuple[list[float], list[int]]:
    """(weights, experts): the likeliest by a softmax over all; `normalize` divides by the sum of the picks' own."""
    chance_E = softmax(logits_E)
    experts = best(logits_E, picks)
    total = sum(chance_E[e] for e in experts) if normalize else 1.0
    return [chance_E[e] / total for e in experts], experts


def neuron_sum(x_D: Array, choice: tuple[Array, Experts], down_ED: Array, up_ED: Array, activation: str, weight_inside: bool) -> Array:
    """Experts of one neuron: Σ over heads and picks of f(w (x · down_e)) up_e, or w f(x · down_e) up_e; `choice` = (weight, expert)_Rk."""
    f, out_D = ACTIVATIONS[activation], np.zeros_like(x_D)
    for weight, expert in zip(choice[0].ravel().tolist(), choice[1].ravel().tolist(), strict=True):
        inner = float(x_D @ down_ED[expert])
        out_D += (f(weight * inner) if weight_inside else weight * f(inner)) * up_ED[expert]
    return out_D


def expert_out(x_D: Array, inner: tuple[Array, Array | None], outer: tuple[Array, Array | None], activation: str, gated: bool) -> Array:
    """One expert of I hidden units: W_out f(W_in x + b) + b', or gated W_out (f(W_gate x) ⊙ W_up x); weights come with their biases."""
    (in_FD, in_bias_F), (out_DI, out_bias_D) = inner, outer
    z_F = in_FD @ x_D if in_bias_F is None else in_FD @ x_D + in_bias_F
    width = out_DI.shape[1]
    hidden_I = np.array([ACTIVATIONS[activation](float(z)) for z in z_F[:width]])
    if gated:
        hidden_I = hidden_I * z_F[width:]
    return out_DI @ hidden_I if out_bias_D is None else out_DI @ hidden_I + out_bias_D
