"""Mixers that attend: plain attention, dynamic mask attention, inner function attention.

B batch, T tokens, M = B·T, D model width, H heads, K kv heads, A score heads, P head dim, F rotated pairs, S cache capacity, W slots,
R retrieval heads, V value vectors, k picks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.config import ModelConfig
from wm_graph.context import Context, rms_norm
from wm_graph.params import AttentionParams, DynamicMaskAttentionParams, InnerFunctionAttentionParams
from wm_graph.state import AttentionState, KeepWindowState, ScoredAttentionState
from wm_kernels.keep_window_attention.definition import keep_window_attention_reference
from wm_kernels.scored_attention.definition import scored_attention_reference

# Added to the logit of a key whose static mask is rounded to 0: far below any other, and finite, so that the mask has a gradient.
_MASKED = 1e9


def attention(
    cfg: ModelConfig, params: AttentionParams, u_MD: Tensor, state: AttentionState | None, context: Context, scope: str
) -> tuple[Tensor, AttentionState | None]:
    """Causal attention with grouped key/value heads, rotated by position unless the model does not (arXiv:2302.13971, arXiv:2305.13245)."""
    out_BTE, state = _attend(cfg, _qkv(cfg, params, u_MD, context), cfg.n_kv_head, state, context, scope)
    return F.linear(out_BTE.reshape(-1, cfg.n_head * cfg.head_dim), params.out, params.out_bias), state


def _qkv(cfg: ModelConfig, params: AttentionParams | DynamicMaskAttentionParams, u_MD: Tensor, context: Context) -> Tensor:
    """Project to queries, keys and values side by side, [B, T, (H + 2K)·P]; queries and keys normalised where the model does."""
    qkv_BTC = F.linear(u_MD, params.qkv, params.qkv_bias).reshape(context.batch, context.tokens, -1)
    if params.q_norm is None or params.k_norm is None:
        return qkv_BTC
    q_BTHP, k_BTKP, v_BTKP = _heads(cfg, qkv_BTC).split([cfg.n_head, cfg.n_kv_head, cfg.n_kv_head], 2)
    return torch.cat([rms_norm(q_BTHP, params.q_norm, cfg.norm_eps), rms_norm(k_BTKP, params.k_norm, cfg.norm_eps), v_BTKP], 2).flatten(2)


def _heads(cfg: ModelConfig, x_BTC: Tensor) -> Tensor:
    return x_BTC.unflatten(2, (-1, cfg.head_dim))


def _attend(
    cfg: ModelConfig, qkv_BTC: Tensor, n_kv_head: int, state: AttentionState | None, context: Context, scope: str
) -> tuple[Tensor, AttentionState | None]:
    """Attention from the packed projection, rotated by position where the model rotates: out_BTE and the state."""
    if not cfg.attention_rope or cfg.rope_scaling == "dynamic":
        # Rows of unequal lengths turn one position by different angles, which attention_rope does not take.
        qk_BTHP, v_BTKP = _heads(cfg, qkv_BTC).split([cfg.n_head + n_kv_head, n_kv_head], 2)
        q_BTHP, k_BTKP = _rotate(cfg, qk_BTHP, context, scope).split([cfg.n_head, n_kv_head], 2)
        out_BTHP, state = _attend_plain((q_BTHP, k_BTKP, v_BTKP), state, context, scope)
        return out_BTHP.flatten(2), state
    inputs, heads = (qkv_BTC, *context.angles[cfg.rotary_width("attention")]), (cfg.n_head, n_kv_head, cfg.head_dim)
    if state is None:
        out_BTE, _, _ = ops.attention_rope(*inputs, None, None, None, context.valid_B, *heads)
    elif context.in_place:
        out_BTE = ops.attention_rope_(*inputs, state.k, state.v, context.position_B, context.valid_B, *heads)
    else:
        out_BTE, *cache = ops.attention_rope(*inputs, state.k, state.v, context.position_B, context.valid_B, *heads)
        state = AttentionState(*cache)
    context.tap(scope, "attention_rope", out_BTE, *(() if state is None else (state.k, state.v)))
    return out_BTE, state


def _attend_plain(
    qkv: tuple[Tensor, ...], state: AttentionState | None, context: Context, scope: str
) -> tuple[Tensor, AttentionState | None]:
    q_BTHP, k_BTKP, v_BTKP = qkv
    if state is None:
        out_BTHP, _, _ = ops.attention(q_BTHP, k_BTKP, v_BTKP, None, None, None, context.valid_B)
    elif context.in_place:
        out_BTHP = ops.attention_(q_BTHP, k_BTKP, v_BTKP, state.k, state.v, context.position_B, context.valid_B)
    else:
        out_BTHP, *cache = ops.attention(q_BTHP, k_BTKP, v_BTKP, state.k, state.v, context.position_B, context.valid_B)
        state = AttentionState(*cache)
    context.tap(scope, "attention", out_BTHP, *(() if state is None else (state.k, state.v)))
    return out_BTHP, state


def _rotate(cfg: ModelConfig, qk_BTHP: Tensor, context: Context, scope: str) -> Tensor:
    """Queries and keys turn by the same angles: one call for all their heads."""
    if not cfg.attention_rope:
        return qk_BTHP
    qk_BTHP = ops.rope(qk_BTHP, *context.angles[cfg.rotary_width("attention")])
    context.tap(scope, "rope", qk_BTHP)
    return qk_BTHP


def dynamic_mask_attention(
    cfg: ModelConfig,
    params: DynamicMaskAttentionParams,
    u_MD: Tensor,
    state: KeepWindowState | ScoredAttentionState | None,
    context: Context,
    scope: str,
) -> tuple[Tensor, KeepWindowState | ScoredAttentionState | None]:
    """Attention whose keys carry a score of their value, exp(A softplus(v W_dt)), that decides which are seen; see `cfg.dma_mask`.

    Source:
        arXiv:2412.11834 (dynamic mask attention), keep-window form of arXiv:2508.02124.
    """
    H, K = cfg.n_head, cfg.n_kv_head
    qk_BTHP, v_BTKP = _heads(cfg, _qkv(cfg, params, u_MD, context)).split([H + K, K], 2)
    q_BTHP, k_BTKP = _rotate(cfg, qk_BTHP, context, scope).split([H, K], 2)
    exponent_MA = params.A * F.softplus(F.linear(v_BTKP.reshape(-1, K * cfg.head_dim), params.dt).to(params.A.dtype))
    score_MA = exponent_MA if cfg.dma_mask == "log" else torch.exp(exponent_MA)
    inputs = (q_BTHP, k_BTKP, v_BTKP, score_MA.reshape(context.batch, context.tokens, cfg.n_score_head))
    out_BTHP: Tensor
    if cfg.keeps_window:
        assert state is None or isinstance(state, KeepWindowState)
        out_BTHP, state = _attend_window(cfg, inputs, state, context, scope)
    else:
        assert state is None or isinstance(state, ScoredAttentionState)
        out_BTHP, state = _attend_scored(cfg.dma_mask, cfg.dma_ratio, inputs, state, context, scope)
    return F.linear(out_BTHP.reshape(-1, H * cfg.head_dim), params.out, params.out_bias), state


def _attend_window(
    cfg: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor, Tensor], state: KeepWindowState | None, context: Context, scope: str
) -> tuple[Tensor, KeepWindowState | None]:
    if state is None:
        out_BTHP = _keep_window_attention(cfg, inputs, context, scope)
    else:
        slots = (state.k, state.v, state.score, state.slot_position, context.position_B, context.valid_B, cfg.keep_window)
        if context.in_place:
            out_BTHP = ops.keep_window_attention_(*inputs, *slots)
        else:
            out_BTHP, *new = ops.keep_window_attention(*inputs, *slots)
            state = KeepWindowState(*new)
    kept = () if state is None else (state.k, state.v, state.score, state.slot_position)
    if context.taps is not None:
        context.taps.record_input(scope, "keep_window_attention", "score", inputs[3])
    context.tap(scope, "keep_window_attention", out_BTHP, *kept)
    return out_BTHP, state


def _keep_window_attention(cfg: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor, Tensor], context: Context, scope: str) -> Tensor:
    """The op without slots; where choices are replayed, its reference, which alone takes another ranking."""
    arguments = (*inputs, None, None, None, None, None, context.valid_B, cfg.keep_window)
    rank_BTK = None if context.taps is None else context.taps.rank(scope, "keep_window_attention", inputs[3])
    if rank_BTK is None:
        return ops.keep_window_attention(*arguments)[0]
    return keep_window_attention_reference(*arguments, rank_BTK)[0]


def _attend_scored(
    scoring: str,
    ratio: float,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    state: ScoredAttentionState | None,
    context: Context,
    scope: str,
) -> tuple[Tensor, ScoredAttentionState | None]:
    rest = (context.position_B, context.valid_B, scoring, ratio)
    if state is None:
        out_BTHP = _scored_attention((*inputs, None, None, None, None, *rest[1:]), context, scope)
    elif context.in_place:
        out_BTHP = ops.scored_attention_(*inputs, state.k, state.v, state.score, *rest)
    else:
        out_BTHP, *cache = ops.scored_attention(*inputs, state.k, state.v, state.score, *rest)
        state = ScoredAttentionState(*cache)
    if context.taps is not None:
        context.taps.record_input(scope, "scored_attention", "score", inputs[3])
    context.tap(scope, "scored_attention", out_BTHP, *(() if state is None else (state.k, state.v, state.score)))
    return out_BTHP, state


def _scored_attention(arguments: tuple[Any, ...], context: Context, scope: str) -> Tensor:
    """The op without caches; where choices are replayed, its reference, which alone hides keys by other scores."""
    rank_BTA = None if context.taps is None else context.taps.rank(scope, "scored_attention", arguments[3])
    if rank_BTA is None:
        return ops.scored_attention(*arguments)[0]
    arguments = (*arguments, rank_BTA)
    return scored_attention_reference(*arguments)[0]


def inner_function_attention(
    cfg: ModelConfig,
    params: InnerFunctionAttentionParams,
    u_MD: Tensor,
    state: AttentionState | ScoredAttentionState | None,
    context: Context,
    scope: str,
) -> tuple[Tensor, AttentionState | ScoredAttentionState | None]:
    """Causal attention without a value projection: the values are the input, gated by vectors that the input retrieves.

        v = u ⊙ e,   e = Σ_{heads, picks} w · value_embed[i],   i the picks best of key_i · (u W_vq)

    with w = 1, or the picks' softmax in form `softmax`. A static mask hides keys by query head and position; see `cfg.ifa_mask`.

    Source:
        arXiv:2407.16958 (inner function attention, dynamic mask).
    """
    H, rows = cfg.n_head, (context.batch, context.tokens)
    v_MD = u_MD * _inner_function(cfg, params, u_MD, context, scope)
    qk_BTC = F.linear(u_MD, params.qk).reshape(*rows, -1)
    v_BTE = v_MD.reshape(*rows, -1)
    if params.mask is None:
        assert state is None or isinstance(state, AttentionState)
        out, state = _attend(cfg, torch.cat([qk_BTC, v_BTE], 2), H, state, context, scope)
    else:
        assert state is None or isinstance(state, ScoredAttentionState)
        q_BTHP, k_BTHP = _rotate(cfg, _heads(cfg, qk_BTC), context, scope).split([H, H], 2)
        v_BTHP = _heads(cfg, v_BTE)
        score_BTH, scoring = _static_mask(cfg, params.mask, context)
        out, state = _attend_scored(scoring, 0.0, (q_BTHP, k_BTHP, v_BTHP, score_BTH), state, context, scope)
    return F.linear(out.reshape(-1, H * cfg.head_dim), params.out), state


def _inner_function(cfg: ModelConfig, params: InnerFunctionAttentionParams, u_MD: Tensor, context: Context, scope: str) -> Tensor:
    """e_MD: the sum of the value vectors that every token retrieves."""
    query_RMd = F.linear(u_MD, params.value_query).reshape(-1, cfg.ifa_head, cfg.d_ifa).transpose(0, 1)
    # One row of logits per token and retrieval head: the same choice as a router's.
    logits_NV = (query_RMd @ params.value_keys.transpose(1, 2)).transpose(0, 1).reshape(-1, cfg.ifa_value)
    made = ops.router_topk(logits_NV, cfg.ifa_pick, True)
    weight_Nk, value_Nk = context.choose_routed(scope, logits_NV, True, made)
    if cfg.ifa_form != "softmax":
        weight_Nk = torch.ones_like(weight_Nk)
    picks = cfg.ifa_head * cfg.ifa_pick
    # In float32: runtimes do not add up scattered half-precision numbers.
    high = torch.promote_types(u_MD.dtype, torch.float32)
    nothing_MV = u_MD.new_zeros((u_MD.shape[0], cfg.ifa_value), dtype=high)
    weight_MV = nothing_MV.scatter_add(1, value_Nk.reshape(-1, picks), weight_Nk.reshape(-1, picks).to(high))
    return weight_MV.to(u_MD.dtype) @ params.value_embed


def _static_mask(cfg: ModelConfig, mask_HS: Tensor, context: Context) -> tuple[Tensor, str]:
    """(score of every key by head, how it is used)."""
    mask_BTH = F.embedding(context.position_BT, mask_HS.t()).to(torch.promote_types(mask_HS.dtype, torch.float32))
    if cfg.ifa_mask == "static_hard":
        return (mask_BTH != 0).to(mask_BTH.dtype), "binary"
    kept_BTH = mask_BTH.clamp(0.0, 1.0)
    kept_BTH = kept_BTH + (kept_BTH.round() - kept_BTH).detach()
    return (kept_BTH - 1.0) * _MASKED, "additive"
