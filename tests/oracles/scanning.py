"""One token of the convolution and of the state space recurrences. Each takes the state before the token and gives the state after it.

H heads, P head dim, G groups, N state, C channels, L taps of the filter, Y = L - 1.
"""

import math

import numpy as np

from oracles.functions import ACTIVATIONS, Array, each, group_of, rms_norm, silu


def convolution_step(state_YC: Array, x_C: Array, weight_CL: Array, bias_C: Array | None, activation: str) -> tuple[Array, Array]:
    """y_c = f(Σ_l weight[c, l] · input_c of l - (L - 1) tokens ago + bias_c), and the last L - 1 inputs (before f)."""
    window_LC = np.concatenate([state_YC, x_C[None]])
    y_C = np.zeros_like(x_C)
    for c in range(len(x_C)):
        total = sum(weight * x for weight, x in zip(weight_CL[c].tolist(), window_LC[:, c].tolist(), strict=True))
        y_C[c] = ACTIVATIONS[activation](total if bias_C is None else total + float(bias_C[c]))
    return y_C, window_LC[1:]


def ssd_step(state_HNP: Array, x_HP: Array, dt_H: Array, A_H: Array, B_GN: Array, C_GN: Array) -> tuple[Array, Array]:
    """S_t = exp(dt A) S_{t-1} + dt B ⊗ x,   y = Cᵀ S_t, for each head with the B and C of its group (arXiv:2405.21060)."""
    after_HNP, y_HP = np.zeros_like(state_HNP), np.zeros_like(x_HP)
    for h in range(len(x_HP)):
        group = group_of(h, len(x_HP), len(B_GN))
        after_HNP[h] = math.exp(dt_H[h] * A_H[h]) * state_HNP[h] + dt_H[h] * np.outer(B_GN[group], x_HP[h])
        y_HP[h] = C_GN[group] @ after_HNP[h]
    return y_HP, after_HNP


def selective_step(state_CN: Array, x_C: Array, dt_C: Array, A_CN: Array, B_N: Array, C_N: Array) -> tuple[Array, Array]:
    """h_t = exp(dt A) h_{t-1} + dt x B,   y = h_t · C, for each channel with its own step and decays (arXiv:2312.00752)."""
    after_CN, y_C = np.zeros_like(state_CN), np.zeros_like(x_C)
    for c in range(len(x_C)):
        decay_N = each(math.exp, dt_C[c] * A_CN[c])
        after_CN[c] = decay_N * state_CN[c] + dt_C[c] * x_C[c] * B_N
        y_C[c] = after_CN[c] @ C_N
    return y_C, after_CN


def gated_norm(y_C: Array, z_C: Array, weight_C: Array, eps: float) -> Array:
    """RMSNorm(y ⊙ SiLU(z)) ⊙ weight: the gate comes before the norm."""
    return rms_norm(y_C * each(silu, z_C), weight_C, eps)
