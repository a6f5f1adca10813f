"""Layers as pure functions: (cfg, params, x_MD, state, context) -> (x_MD, state).

B batch, T tokens, M = B·T, D model width, H heads, K kv heads, P head dim, N state, G groups, F rotated pairs, S cache capacity, W slots,
R retrieval heads, J sub-keys, k picks. Hidden states stay flat, x_MD, so that every linear layer is one 2-D product.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.config import ModelConfig
from wm_graph.params import AttentionParams, CdmoeParams, DynamicMaskAttentionParams, LayerParams, MlpParams, SsdParams
from wm_graph.state import AttentionState, KeepWindowState, LayerState, SsdState
from wm_graph.taps import Taps
from wm_kernels.keep_window_attention.definition import keep_window_attention_reference


@dataclass(frozen=True)
class Context:
    """What all layers of one call share.

    Attributes:
        batch: rows of the call (B).
        tokens: tokens per row, padding included (T).
        position_B: tokens each row has seen before the call; None without a state.
        valid_B: tokens of each row that count; None when all do.
        angles: rotated width -> (cos_BTF, sin_BTF).
        in_place: ops write into the given state.
        taps: recorder of op outputs, or None.
    """

    batch: int
    tokens: int
    position_B: Tensor | None
    valid_B: Tensor | None
    angles: dict[int, tuple[Tensor, Tensor]]
    in_place: bool = False
    taps: Taps | None = None

    def tap(self, scope: str, op: str, *outputs: Tensor) -> None:
        """Record the outputs of one op call, if somebody listens."""
        if self.taps is not None:
            self.taps.record(scope, op, outputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, accumulated in float32 or higher (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer(
    cfg: ModelConfig,
    params: LayerParams,
    x_MD: Tensor,
    state: LayerState | None,
    context: Context,
    scope: str,
    select_BS: Tensor | None = None,
) -> tuple[Tensor, LayerState | None]:
    """One layer: y = r1 ⊙ x + Mixer(RMSNorm(x)), z = r2 ⊙ y + FeedForward(RMSNorm(y)); plain residuals have r = 1.

    Args:
        cfg: the model.
        params: this layer's parameters.
        x_MD: residual stream.
        state: this layer's state, or None on the training path.
        context: what the layers of this call share.
        scope: the layer's name, such as `layers.3`.
        select_BS: token indices that are wanted of the result; None for all. The feed-forward is not computed for the others.

    Returns:
        (z_MD, M = B·S where tokens are selected; new state).

    Source:
        arXiv:2412.11834, architecture figure (learned residuals); arXiv:2302.13971 (plain).
    """
    normed_MD = rms_norm(x_MD, params.mixer_norm, cfg.norm_eps)
    mixed_MD, state = _mix(cfg, params, normed_MD, state, context, scope)
    if select_BS is not None:
        x_MD, mixed_MD = (select_tokens(part_MD, select_BS, context.tokens) for part_MD in (x_MD, mixed_MD))
        context = replace(context, tokens=select_BS.shape[1])
    normed_MD, y_MD = ops.residual_rms_norm(mixed_MD, x_MD, params.mixer_residual, params.feed_forward_norm, cfg.norm_eps)
    context.tap(scope, "residual_rms_norm", normed_MD, y_MD)
    if isinstance(params.feed_forward, MlpParams):
        out_MD = mlp(params.feed_forward, normed_MD)
    else:
        out_MD = cdmoe(cfg, params.feed_forward, normed_MD, context, scope)
    skip_MD = y_MD if params.feed_forward_residual is None else params.feed_forward_residual * y_MD
    return out_MD + skip_MD, state


def select_tokens(x_MD: Tensor, select_BS: Tensor, tokens: int) -> Tensor:
    """The rows of x_MD that `select_BS` names, flat in (b, s) order."""
    row_B = torch.arange(select_BS.shape[0], device=select_BS.device) * tokens
    return F.embedding((select_BS + row_B.unsqueeze(-1)).reshape(-1), x_MD)


def _mix(
    cfg: ModelConfig, params: LayerParams, u_MD: Tensor, state: LayerState | None, context: Context, scope: str
) -> tuple[Tensor, LayerState | None]:
    mixer = params.mixer
    if isinstance(mixer, SsdParams):
        assert state is None or isinstance(state, SsdState)
        return ssd(cfg, mixer, u_MD, state, context, scope)
    if isinstance(mixer, AttentionParams):
        assert state is None or isinstance(state, AttentionState)
        return attention(cfg, mixer, u_MD, state, context, scope)
    assert state is None or isinstance(state, KeepWindowState)
    return dynamic_mask_attention(cfg, mixer, u_MD, state, context, scope)


def ssd(
    cfg: ModelConfig, params: SsdParams, u_MD: Tensor, state: SsdState | None, context: Context, scope: str
) -> tuple[Tensor, SsdState | None]:
    """State space duality mixer of Cheems: C, B, x, dt from one projection; no convolution, gate or skip.

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t,   y_t = S_t C_t,   A = -exp(A_log), dt = softplus(u W_dt)

    with B and C rotated by position when `cfg.ssd_rope`.

    Source:
        arXiv:2405.21060 section 6; rotation arXiv:2412.11834.
    """
    rows = (context.batch, context.tokens)
    bc_width, x_width = cfg.ssd_group * cfg.ssd_state, cfg.ssd_head * cfg.ssd_head_dim
    C_MC, B_MC, x_MC, dt_MH = F.linear(u_MD, params.in_proj).split([bc_width, bc_width, x_width, cfg.ssd_head], -1)
    x_BTHP = x_MC.reshape(*rows, cfg.ssd_head, cfg.ssd_head_dim)
    B_BTGN, C_BTGN = (part.reshape(*rows, cfg.ssd_group, cfg.ssd_state) for part in (B_MC, C_MC))
    A_H = -torch.exp(params.A_log)
    dt_BTH = F.softplus(dt_MH.to(A_H.dtype)).reshape(*rows, cfg.ssd_head)
    state_BHPN = None if state is None else state.ssd
    if cfg.ssd_rope:
        op, inputs = "ssd_scan_rope", (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, *context.angles[cfg.ssd_state])
        y_BTHP, new_BHPN = _ssd_scan_rope(inputs, state_BHPN, context)
    else:
        op = "ssd_scan"
        y_BTHP, new_BHPN = _ssd_scan((x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN), state_BHPN, context)
    context.tap(scope, op, y_BTHP, new_BHPN)
    return F.linear(y_BTHP.reshape(-1, x_width), params.out_proj), None if state is None else SsdState(new_BHPN)


def _ssd_scan_rope(inputs: tuple[Tensor, ...], state_BHPN: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    if context.in_place and state_BHPN is not None:
        return ops.ssd_scan_rope_(*inputs, state_BHPN, context.valid_B), state_BHPN
    return ops.ssd_scan_rope(*inputs, state_BHPN, context.valid_B)


def _ssd_scan(inputs: tuple[Tensor, ...], state_BHPN: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    if context.in_place and state_BHPN is not None:
        return ops.ssd_scan_(*inputs, state_BHPN, context.valid_B), state_BHPN
    return ops.ssd_scan(*inputs, state_BHPN, context.valid_B)


def _qkv(cfg: ModelConfig, params: AttentionParams | DynamicMaskAttentionParams, u_MD: Tensor, context: Context) -> Tensor:
    """Project to queries, keys and values side by side, [B, T, (H + 2K)·P]; queries and keys normalised where the model does."""
    qkv_BTC = F.linear(u_MD, params.qkv).reshape(context.batch, context.tokens, -1)
    if params.q_norm is None or params.k_norm is None:
        return qkv_BTC
    q_BTHP, k_BTKP, v_BTKP = _heads(cfg, qkv_BTC).split([cfg.n_head, cfg.n_kv_head, cfg.n_kv_head], 2)
    return torch.cat([rms_norm(q_BTHP, params.q_norm, cfg.norm_eps), rms_norm(k_BTKP, params.k_norm, cfg.norm_eps), v_BTKP], 2).flatten(2)


def _heads(cfg: ModelConfig, qkv_BTC: Tensor) -> Tensor:
    return qkv_BTC.unflatten(2, (cfg.n_head + 2 * cfg.n_kv_head, cfg.head_dim))


def attention(
    cfg: ModelConfig, params: AttentionParams, u_MD: Tensor, state: AttentionState | None, context: Context, scope: str
) -> tuple[Tensor, AttentionState | None]:
    """Causal attention with rotary positions and grouped key/value heads (arXiv:2302.13971, arXiv:2305.13245)."""
    inputs = (_qkv(cfg, params, u_MD, context), *context.angles[cfg.head_dim])
    heads = (cfg.n_head, cfg.n_kv_head)
    if state is None:
        out_BTE, _, _ = ops.attention_rope(*inputs, None, None, None, context.valid_B, *heads)
    elif context.in_place:
        out_BTE = ops.attention_rope_(*inputs, state.k, state.v, context.position_B, context.valid_B, *heads)
    else:
        out_BTE, *cache = ops.attention_rope(*inputs, state.k, state.v, context.position_B, context.valid_B, *heads)
        state = AttentionState(*cache)
    context.tap(scope, "attention_rope", out_BTE, *(() if state is None else (state.k, state.v)))
    return F.linear(out_BTE.reshape(-1, cfg.n_head * cfg.head_dim), params.out), state


def dynamic_mask_attention(
    cfg: ModelConfig, params: DynamicMaskAttentionParams, u_MD: Tensor, state: KeepWindowState | None, context: Context, scope: str
) -> tuple[Tensor, KeepWindowState | None]:
    """Attention to the W best-scored keys so far: score_s = exp(A softplus(v_s W_dt)), added to q·k/sqrt(P).

    Source:
        arXiv:2412.11834 (dynamic mask attention), keep-window form of arXiv:2508.02124.
    """
    H, K = cfg.n_head, cfg.n_kv_head
    qk_BTHP, v_BTKP = _heads(cfg, _qkv(cfg, params, u_MD, context)).split([H + K, K], 2)
    # Queries and keys turn by the same angles: one call for all their heads.
    qk_BTHP = ops.rope(qk_BTHP, *context.angles[cfg.head_dim])
    context.tap(scope, "rope", qk_BTHP)
    q_BTHP, k_BTKP = qk_BTHP.split([H, K], 2)
    v_MC = v_BTKP.reshape(-1, cfg.n_kv_head * cfg.head_dim)
    score_MK = torch.exp(params.A * F.softplus(F.linear(v_MC, params.dt).to(params.A.dtype)))
    score_BTK = score_MK.reshape(context.batch, context.tokens, cfg.n_kv_head)
    inputs = (q_BTHP, k_BTKP, v_BTKP, score_BTK)
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
        context.taps.record_input(scope, "keep_window_attention", "score", score_BTK)
    context.tap(scope, "keep_window_attention", out_BTHP, *kept)
    return F.linear(out_BTHP.reshape(-1, cfg.n_head * cfg.head_dim), params.out), state


def _keep_window_attention(cfg: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor, Tensor], context: Context, scope: str) -> Tensor:
    """The op without slots; where choices are replayed, its reference, which alone takes another ranking."""
    arguments = (*inputs, None, None, None, None, None, context.valid_B, cfg.keep_window)
    rank_BTK = None if context.taps is None else context.taps.window_rank(scope, inputs[3])
    if rank_BTK is None:
        return ops.keep_window_attention(*arguments)[0]
    return keep_window_attention_reference(*arguments, rank_BTK)[0]


def mlp(params: MlpParams | CdmoeParams, x_MD: Tensor) -> Tensor:
    """Gated MLP: W_down(SiLU(W_gate x) ⊙ W_up x) (arXiv:2002.05202)."""
    gate_MC, up_MC = F.linear(x_MD, params.gate_up).chunk(2, -1)
    return F.linear(F.silu(gate_MC) * up_MC, params.down)


def cdmoe(cfg: ModelConfig, params: CdmoeParams, x_MD: Tensor, context: Context, scope: str) -> Tensor:
    """Cross-domain mixture of experts, form C2: the gated MLP plus k one-neuron experts per retrieval head, found by product keys.

        out = MLP(x) + Σ_{heads, picks} w · SiLU(x·down_e) · up_e

    Source:
        arXiv:2412.11834; retrieval as arXiv:2407.04153.
    """
    half = cfg.d_retrieval // 2
    # The two halves are the slowest axis of the query projection's outputs: [2, R, d].
    query_B2 = F.linear(x_MD, params.query).reshape(context.batch, context.tokens, 2, cfg.n_retrieval_head, half)
    query_BTR2d = query_B2.transpose(2, 3)
    weight_BTRk, expert_BTRk = ops.product_key_topk(query_BTR2d, params.keys, cfg.n_pick)
    if context.taps is not None:
        context.taps.record_input(scope, "product_key_topk", "query", query_BTR2d)
        weight_BTRk, expert_BTRk = context.taps.choose_experts(scope, query_BTR2d, params.keys, (weight_BTRk, expert_BTRk))
    context.tap(scope, "product_key_topk", weight_BTRk, expert_BTRk)
    x_BTD = x_MD.reshape(context.batch, context.tokens, cfg.d_model)
    y_BTD = ops.expert_mix(x_BTD, expert_BTRk, weight_BTRk, params.expert_down, params.expert_up, "silu", False)
    context.tap(scope, "expert_mix", y_BTD)
    return mlp(params, x_MD) + y_BTD.reshape(-1, cfg.d_model)
