"""Mixers that attend. Each is an object that remembers its cells; `step` takes the next token's normed input and gives its output.

D model width, H heads, K kv heads, A score heads, P head dim, R retrieval heads, V value vectors, k picks.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from oracles.attending import Cell, best_ranked, mixture, visible
from oracles.choosing import route
from oracles.functions import Array, each, group_of, linear, rms_norm, softplus
from oracles.rotation import rotate
from oracles.scan_layers import Token, cut
from wm_graph.config import ModelConfig

MASKED = 1e9  # what the rounded static mask takes off a hidden key's score: far more than scores differ by, yet finite


def turned(cfg: ModelConfig, q_HP: Array, k_KP: Array, token: Token) -> tuple[Array, Array]:
    """Queries and keys turned by the token's position, all features of a head or the first `rotary_dim`; as they are where none is."""
    if not cfg.attention_rope:
        return q_HP, k_KP
    turn = token.turns[cfg.rotary_dim or cfg.head_dim]
    q_HP, k_KP = (np.array([rotate(head_P, *turn) for head_P in heads]) for heads in (q_HP, k_KP))
    token.note("rope", y=np.concatenate([q_HP, k_KP]))
    return q_HP, k_KP


def queries_keys_values(cfg: ModelConfig, weights: Mapping[str, Array], u_D: Array, token: Token) -> tuple[Array, Array, Array]:
    """q, k and v of plain and dynamic mask attention: projected, q and k normed per head where the model does, then turned."""
    projected = linear(weights["qkv"], u_D, weights["qkv_bias"] if cfg.attention_bias else None)
    key_shape = (cfg.n_kv_head, cfg.head_dim)
    q_HP, k_KP, v_KP = cut(projected, (cfg.n_head, cfg.head_dim), key_shape, key_shape)
    if cfg.qk_norm:
        q_HP = np.array([rms_norm(q_P, weights["q_norm"], cfg.norm_eps) for q_P in q_HP])
        k_KP = np.array([rms_norm(k_P, weights["k_norm"], cfg.norm_eps) for k_P in k_KP])
    return *turned(cfg, q_HP, k_KP, token), v_KP


def attend_all(cells_K: Sequence[list[Cell]], q_HP: Array, k_KP: Array, v_KP: Array, token: Token) -> Array:
    """Append the token's keys and values to the cells of every kv head, then let every query head see all cells of its kv head."""
    for cells, k_P, v_P in zip(cells_K, k_KP, v_KP, strict=True):
        cells.append(Cell(token.position, 0.0, k_P, v_P))
    out_HP = np.array([mixture(q_P, cells_K[group_of(h, len(q_HP), len(cells_K))]) for h, q_P in enumerate(q_HP)])
    # One calculation, two ways to cut it into ops: rope and attention apart, or attention_rope, whose output is flat.
    token.note("attention", out=out_HP, k=k_KP, v=v_KP)
    token.note("attention_rope", out=out_HP.reshape(-1), k=k_KP, v=v_KP)
    return out_HP


def attend_scored(
    cells_H: Sequence[list[Cell]], qkv: tuple[Array, Array, Array], score_A: Array, token: Token, scoring: str, ratio: float
) -> Array:
    """The same where keys carry scores, of which each query head reads its own: so cells are kept per query head."""
    q_HP, k_KP, v_KP = qkv
    out_HP = np.zeros_like(q_HP)
    for h, q_P in enumerate(q_HP):
        kv, score = group_of(h, len(q_HP), len(k_KP)), score_A[group_of(h, len(q_HP), len(score_A))]
        cells_H[h].append(Cell(token.position, float(score), k_KP[kv], v_KP[kv]))
        out_HP[h] = mixture(q_P, visible(cells_H[h], scoring, ratio))
    token.note("scored_attention", out=out_HP, k=k_KP, v=v_KP, score=score_A)
    return out_HP


class Attention:
    """Causal attention with grouped key/value heads: out = W_out Σ softmax(q · k / sqrt(P)) v over all tokens so far."""

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.cells_K: list[list[Cell]] = [[] for _ in range(cfg.n_kv_head)]

    def step(self, u_D: Array, token: Token) -> Array:
        out_HP = attend_all(self.cells_K, *queries_keys_values(self.cfg, self.weights, u_D, token), token)
        return linear(self.weights["out"], out_HP.reshape(-1), self.weights["out_bias"] if self.cfg.attention_bias else None)


class DynamicMaskAttention:
    """Attention whose keys carry a score made of the token's values: exp(A softplus(W_dt v)), one per kv head or query head.

    By `dma_mask` the score is the rank by which a window of keys is kept, and is added to q · k / sqrt(P) (keep_window; log takes
    A softplus(W_dt v) itself); or it is added (additive), hides keys below 1 (binary), or is added and hides the lowest share (ratio).
    Keys are ranked anew among all tokens so far, at every token. arXiv:2412.11834, arXiv:2508.02124.
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.seen_K: list[list[Cell]] = [[] for _ in range(cfg.n_kv_head)]
        self.seen_H: list[list[Cell]] = [[] for _ in range(cfg.n_head)]

    def step(self, u_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        q_HP, k_KP, v_KP = queries_keys_values(cfg, weights, u_D, token)
        score_A = weights["A"] * each(softplus, linear(weights["dt"], v_KP.reshape(-1)))
        if cfg.dma_mask != "log":
            score_A = each(math.exp, score_A)
        assert len(score_A) == (cfg.n_head if cfg.dma_heads == "query" else cfg.n_kv_head)
        if cfg.dma_mask in ("keep_window", "log"):
            out_HP = self._attend_window(q_HP, k_KP, v_KP, score_A, token)
        else:
            out_HP = attend_scored(self.seen_H, (q_HP, k_KP, v_KP), score_A, token, cfg.dma_mask, cfg.dma_ratio)
        return linear(weights["out"], out_HP.reshape(-1), weights["out_bias"] if cfg.attention_bias else None)

    def _attend_window(self, q_HP: Array, k_KP: Array, v_KP: Array, score_K: Array, token: Token) -> Array:
        for seen, score, k_P, v_P in zip(self.seen_K, score_K.tolist(), k_KP, v_KP, strict=True):
            seen.append(Cell(token.position, score, k_P, v_P))
        kept_KW = [best_ranked(seen, self.cfg.keep_window) for seen in self.seen_K]
        out_HP = np.array([mixture(q_P, kept_KW[group_of(h, len(q_HP), len(kept_KW))]) for h, q_P in enumerate(q_HP)])
        slots = {"k": "key_P", "v": "value_P", "score": "score", "slot_position": "position"}
        kept = {name: np.array([[getattr(cell, field) for cell in cells] for cells in kept_KW]) for name, field in slots.items()}
        token.note("keep_window_attention", out=out_HP, **kept)
        return out_HP


class InnerFunctionAttention:
    """Causal attention without a value projection: v = u ⊙ e, the input gated by vectors that it retrieves (arXiv:2407.16958).

    e = Σ over heads and picks of value_embed[i], i the picks best of key_i · (W_vq u); form softmax weights each head's picks by their
    softmax. A static mask over (query head, position) hides keys: where its parameter is 0 (static_hard), or rounds to 0 (static_ste).
    """

    def __init__(self, cfg: ModelConfig, weights: Mapping[str, Array]) -> None:
        self.cfg, self.weights = cfg, weights
        self.cells_H: list[list[Cell]] = [[] for _ in range(cfg.n_head)]

    def step(self, u_D: Array, token: Token) -> Array:
        cfg, weights, heads = self.cfg, self.weights, (self.cfg.n_head, self.cfg.head_dim)
        v_HP = (u_D * self._inner_function(u_D, token)).reshape(heads)
        q_HP, k_HP = cut(linear(weights["qk"], u_D), heads, heads)
        q_HP, k_HP = turned(cfg, q_HP, k_HP, token)
        if cfg.ifa_mask == "none":
            out_HP = attend_all(self.cells_H, q_HP, k_HP, v_HP, token)
        else:
            score_H, scoring = self._static_mask(weights["mask"][:, token.position])
            out_HP = attend_scored(self.cells_H, (q_HP, k_HP, v_HP), score_H, token, scoring, 0.0)
        return linear(weights["out"], out_HP.reshape(-1))

    def _inner_function(self, u_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        query_Rd = linear(weights["value_query"], u_D).reshape(cfg.ifa_head, cfg.d_ifa)
        chosen = [
            route([float(key_d @ query_d) for key_d in keys_Vd], cfg.ifa_pick, normalize=True)
            for query_d, keys_Vd in zip(query_Rd, weights["value_keys"], strict=True)
        ]
        token.note("router_topk", weight=[weight for weight, _ in chosen], expert=[value for _, value in chosen])
        e_D = np.zeros_like(u_D)
        for weight_k, value_k in chosen:
            for weight, value in zip(weight_k, value_k, strict=True):
                e_D += (weight if cfg.ifa_form == "softmax" else 1.0) * weights["value_embed"][value]
        return e_D

    def _static_mask(self, mask_H: Array) -> tuple[Array, str]:
        """(score of this position's key by head, how it is used)."""
        if self.cfg.ifa_mask == "static_hard":
            return np.array([0.0 if mask == 0 else 1.0 for mask in mask_H]), "binary"
        return np.array([(round(min(max(mask, 0.0), 1.0)) - 1) * MASKED for mask in mask_H.tolist()]), "additive"
