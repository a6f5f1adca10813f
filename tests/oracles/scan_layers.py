"""Mixers that scan over time. Each is an object that remembers its state; `step` takes the next token's normed input and gives its output.

D model width, H heads, P head dim, G groups, N state, C channels, L taps of the filter, F rotated pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracles.functions import Array, each, linear, rms_norm, silu, softplus
from oracles.rotation import rotate
from oracles.scanning import convolution_step, gated_norm, selective_step, ssd_step
from wm_graph.config import ModelConfig


@dataclass(frozen=True)
class Token:
    """What every layer is told about the token at hand.

    Attributes:
        position: tokens before it.
        turns: rotated width -> (cos_F, sin_F) of its position.
        note: writes down what an op of wm would give: note("ssd_scan", y=..., state=...).
    """

    position: int
    turns: dict[int, tuple[Array, Array]]
    note: Callable[..., None]


def turned_pair(cfg: ModelConfig, B_GN: Array, C_GN: Array, token: Token) -> tuple[str, Array, Array]:
    """(name of the op, B, C), turned by the token's position where the model rotates: the scan sees positions relative to each other."""
    if not cfg.ssd_rope:
        return "ssd_scan", B_GN, C_GN
    B_GN, C_GN = (np.array([rotate(group_N, *token.turns[cfg.ssd_state]) for group_N in part_GN]) for part_GN in (B_GN, C_GN))
    return "ssd_scan_rope", B_GN, C_GN


class Ssd:
    """State space duality mixer of Cheems: C, B, x and dt straight from the input; no convolution, gate or skip (arXiv:2412.11834).

    S_t = exp(dt A) S_{t-1} + dt B ⊗ x,   y = Cᵀ S_t,   out = W_out y,   A = -exp(A_log),   dt = softplus(W_dt u)
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.state_HNP = np.zeros((cfg.ssd_head, cfg.ssd_state, cfg.ssd_head_dim))

    def step(self, u_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        groups, heads = (cfg.ssd_group, cfg.ssd_state), (cfg.ssd_head, cfg.ssd_head_dim)
        C, B, x, dt = cut(linear(weights["in_proj"], u_D), groups, groups, heads, (cfg.ssd_head,))
        op, B, C = turned_pair(cfg, B, C, token)
        y_HP, self.state_HNP = ssd_step(self.state_HNP, x, each(softplus, dt), -np.exp(weights["A_log"]), B, C)
        token.note(op, y=y_HP, state=self.state_HNP)
        return linear(weights["out_proj"], y_HP.reshape(-1))


class Mamba2:
    """Mamba-2: a short convolution over x, B and C, the same scan with a skip D x, a norm gated by z (arXiv:2405.21060).

    z, xBC, dt = W_in u      x, B, C = SiLU(conv(xBC))      y = scan(x) + D x      out = W_out RMSNorm(y ⊙ SiLU(z))

    dt = softplus(dt + dt_bias), not below dt_min nor, unless that is 0, above dt_max.
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.state_HNP = np.zeros((cfg.ssd_head, cfg.ssd_state, cfg.ssd_head_dim))
        self.inputs_YC = np.zeros((cfg.conv_size - 1, len(weights["conv_weight"])))

    def step(self, u_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        groups, heads = (cfg.ssd_group, cfg.ssd_state), (cfg.ssd_head, cfg.ssd_head_dim)
        projected = linear(weights["in_proj"], u_D, weights["in_proj_bias"] if cfg.mamba_bias else None)
        z, xBC, dt = cut(projected, (cfg.ssd_head * cfg.ssd_head_dim,), (len(weights["conv_weight"]),), (cfg.ssd_head,))
        xBC, self.inputs_YC = short_convolution(cfg, weights, self.inputs_YC, xBC, token)
        x, B, C = cut(xBC, heads, groups, groups)
        op, B, C = turned_pair(cfg, B, C, token)
        y_HP, self.state_HNP = ssd_step(self.state_HNP, x, self._step_size(dt), -np.exp(weights["A_log"]), B, C)
        token.note(op, y=y_HP, state=self.state_HNP)
        skipped_HP = np.array([y_P + skip * x_P for y_P, skip, x_P in zip(y_HP, weights["D"], x, strict=True)])
        normed = gated_norm(skipped_HP.reshape(-1), z, weights["norm"], cfg.norm_eps)
        token.note("gated_rms_norm", out=normed)
        return linear(weights["out_proj"], normed, weights["out_proj_bias"] if cfg.mamba_bias else None)

    def _step_size(self, dt_H: Array) -> Array:
        most = self.cfg.dt_max or float("inf")
        return np.array([min(max(dt, self.cfg.dt_min), most) for dt in each(softplus, dt_H + self.weights["dt_bias"])])


class Mamba1:
    """Mamba-1: a short convolution over x, the selective scan with a skip D x, a gate (arXiv:2312.00752).

    x, z = W_in u      x = SiLU(conv(x))      dt, B, C = W_x x      y = scan(x) + D x      out = W_out (y ⊙ SiLU(z))

    dt = softplus(W_dt dt + dt_bias); Jamba norms dt, B and C first (arXiv:2403.19887).
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.state_CN = np.zeros((cfg.mamba1_width, cfg.mamba1_state))
        self.inputs_YC = np.zeros((cfg.conv_size - 1, cfg.mamba1_width))

    def step(self, u_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        projected = linear(weights["in_proj"], u_D, weights["in_proj_bias"] if cfg.mamba_bias else None)
        x, z = cut(projected, (cfg.mamba1_width,), (cfg.mamba1_width,))
        x, self.inputs_YC = short_convolution(cfg, weights, self.inputs_YC, x, token)
        dt, B, C = cut(linear(weights["x_proj"], x), (cfg.dt_rank,), (cfg.mamba1_state,), (cfg.mamba1_state,))
        if cfg.mamba1_norm:
            dt, B, C = (rms_norm(part, weights[f"{name}_norm"], cfg.norm_eps) for name, part in (("dt", dt), ("B", B), ("C", C)))
        dt_C = each(softplus, linear(weights["dt_proj"], dt, weights["dt_bias"]))
        y_C, self.state_CN = selective_step(self.state_CN, x, dt_C, -np.exp(weights["A_log"]), B, C)
        token.note("selective_scan", y=y_C, state=self.state_CN)
        gated_C = (y_C + weights["D"] * x) * each(silu, z)
        return linear(weights["out_proj"], gated_C, weights["out_proj_bias"] if cfg.mamba_bias else None)


def short_convolution(cfg: ModelConfig, weights: Mapping[str, Array], inputs_YC: Array, x_C: Array, token: Token) -> tuple[Array, Array]:
    """SiLU of the convolution over this input and the last L - 1 before it, and the inputs to remember."""
    bias_C = weights["conv_bias"] if cfg.conv_bias else None
    y_C, inputs_YC = convolution_step(inputs_YC, x_C, weights["conv_weight"], bias_C, "silu")
    token.note("causal_conv1d", y=y_C, state=inputs_YC)
    return y_C, inputs_YC


def cut(x_D: Array, *shapes: tuple[int, ...]) -> list[Any]:
    """Consecutive parts of a vector, each in its shape; they must use it up."""
    parts, start = [], 0
    for shape in shapes:
        end = start + int(np.prod(shape))
        parts.append(x_D[start:end].reshape(shape))
        start = end
    assert start == len(x_D), f"{len(x_D)} features, of which {start} are read"
    return parts
