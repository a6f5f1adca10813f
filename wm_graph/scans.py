"""Mixers that scan over time: Cheems' SSD, Mamba-2, Mamba-1.

B batch, T tokens, M = B·T, D model width, H heads, P head dim, G groups, N state, C channels, F rotated pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.config import ModelConfig
from wm_graph.context import Context, rms_norm
from wm_graph.params import Mamba1Params, Mamba2Params, SsdParams
from wm_graph.state import Mamba1State, Mamba2State, SsdState


def ssd(
    cfg: ModelConfig, params: SsdParams, u_MD: Tensor, state: SsdState | None, context: Context, scope: str
) -> tuple[Tensor, SsdState | None]:
    """State space duality mixer of Cheems: C, B, x, dt from one projection; no convolution, gate or skip.

        S_t = exp(dt_t A) S_{t-1} + B_t ⊗ dt_t x_t,   y_t = C_t^T S_t,   A = -exp(A_log), dt = softplus(u W_dt)

    with B and C rotated by position when `cfg.ssd_rope`.

    Source:
        arXiv:2405.21060 section 6; rotation arXiv:2412.11834.
    """
    bc_width, x_width = cfg.ssd_group * cfg.ssd_state, cfg.ssd_head * cfg.ssd_head_dim
    C_MC, B_MC, x_MC, dt_MH = F.linear(u_MD, params.in_proj).split([bc_width, bc_width, x_width, cfg.ssd_head], -1)
    dt_MH = F.softplus(dt_MH.to(params.A_log.dtype))
    x_BTHP = x_MC.reshape(context.batch, context.tokens, cfg.ssd_head, cfg.ssd_head_dim)
    y_BTHP, new_BHNP = _ssd_scan(cfg, (x_BTHP, dt_MH, params.A_log, B_MC, C_MC), None if state is None else state.ssd, context, scope)
    return F.linear(y_BTHP.reshape(-1, x_width), params.out_proj), None if state is None else SsdState(new_BHNP)


def _ssd_scan(
    cfg: ModelConfig, inputs: tuple[Tensor, ...], state_BHNP: Tensor | None, context: Context, scope: str
) -> tuple[Tensor, Tensor]:
    """The scan over x_BTHP, dt_MH, A_log_H and B and C in any shape, with rotation where the model rotates: y_BTHP and the state."""
    x_BTHP, dt_MH, A_log_H, B, C = inputs
    rows = (context.batch, context.tokens)
    dt_BTH = dt_MH.reshape(*rows, cfg.ssd_head)
    B_BTGN, C_BTGN = (part.reshape(*rows, cfg.ssd_group, cfg.ssd_state) for part in (B, C))
    op, angles = ("ssd_scan_rope", context.angles[cfg.ssd_state]) if cfg.ssd_rope else ("ssd_scan", ())
    arguments = (x_BTHP, dt_BTH, -torch.exp(A_log_H), B_BTGN, C_BTGN, *angles)
    if context.in_place and state_BHNP is not None:
        in_place = ops.ssd_scan_rope_ if cfg.ssd_rope else ops.ssd_scan_
        y_BTHP, new_BHNP = in_place(*arguments, state_BHNP, context.valid_B), state_BHNP
    else:
        functional = ops.ssd_scan_rope if cfg.ssd_rope else ops.ssd_scan
        y_BTHP, new_BHNP = functional(*arguments, state_BHNP, context.valid_B)
    context.tap(scope, op, y_BTHP, new_BHNP)
    return y_BTHP, new_BHNP


def mamba2(
    cfg: ModelConfig, params: Mamba2Params, u_MD: Tensor, state: Mamba2State | None, context: Context, scope: str
) -> tuple[Tensor, Mamba2State | None]:
    """Mamba-2: a short convolution, the SSD scan with a skip, a norm gated by z.

        z, xBC, dt = u W_in       x, B, C = SiLU(conv(xBC))       y = scan(x, dt, A, B, C) + D x       out = RMSNorm(y ⊙ SiLU(z)) W_out

    dt = clamp(softplus(dt + dt_bias), dt_min, dt_max). With `cfg.ssd_rope`, C and B are rotated by position after the convolution.

    Source:
        arXiv:2405.21060 section 7.
    """
    width, bc_width = cfg.ssd_head * cfg.ssd_head_dim, cfg.ssd_group * cfg.ssd_state
    z_MC, xBC_MC, dt_MH = F.linear(u_MD, params.in_proj, params.in_proj_bias).split([width, width + 2 * bc_width, cfg.ssd_head], -1)
    xBC_BTC, conv = _convolution(params, xBC_MC, None if state is None else state.conv, context, scope)
    x_BTC, B_BTC, C_BTC = xBC_BTC.split([width, bc_width, bc_width], -1)
    x_BTHP = x_BTC.unflatten(2, (cfg.ssd_head, cfg.ssd_head_dim))
    dt_MH = _step_size(cfg, dt_MH.to(params.A_log.dtype) + params.dt_bias.to(params.A_log.dtype))
    inputs = (x_BTHP, dt_MH, params.A_log, B_BTC, C_BTC)
    y_BTHP, new_BHNP = _ssd_scan(cfg, inputs, None if state is None else state.ssd, context, scope)
    y_MC = (y_BTHP + x_BTHP * params.D.unsqueeze(-1)).reshape(-1, width)
    normed_MC = ops.gated_rms_norm(y_MC, z_MC, params.norm, cfg.norm_eps)
    context.tap(scope, "gated_rms_norm", normed_MC)
    out_MD = F.linear(normed_MC, params.out_proj, params.out_proj_bias)
    return out_MD, None if state is None else Mamba2State(conv, new_BHNP)


def _step_size(cfg: ModelConfig, dt: Tensor) -> Tensor:
    dt = F.softplus(dt)
    if not cfg.dt_min and not cfg.dt_max:
        return dt
    return dt.clamp(cfg.dt_min, cfg.dt_max or None)


def _convolution(
    params: Mamba1Params | Mamba2Params, x_MC: Tensor, state_BYC: Tensor | None, context: Context, scope: str
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal convolution over time, and its state.

    Not flat: torch.export takes the first stride of a tensor that was flattened for min(C, C·T), so that a tensor unflattened again would
    seem contiguous for some T only.
    """
    inputs = (x_MC.reshape(context.batch, context.tokens, -1), params.conv_weight, params.conv_bias)
    if context.in_place and state_BYC is not None:
        y_BTC, new_BYC = ops.causal_conv1d_(*inputs, state_BYC, context.valid_B, "silu"), state_BYC
    else:
        y_BTC, new_BYC = ops.causal_conv1d(*inputs, state_BYC, context.valid_B, "silu")
    context.tap(scope, "causal_conv1d", y_BTC, new_BYC)
    return y_BTC, new_BYC


def mamba1(
    cfg: ModelConfig, params: Mamba1Params, u_MD: Tensor, state: Mamba1State | None, context: Context, scope: str
) -> tuple[Tensor, Mamba1State | None]:
    """Mamba-1: a short convolution, the selective scan with a skip, a gate.

        x, z = u W_in       x = SiLU(conv(x))       dt, B, C = x W_x       y = scan(x, softplus(dt W_dt + dt_bias), A, B, C) + D x
        out = (y ⊙ SiLU(z)) W_out

    with RMS norms of dt, B and C where `cfg.mamba1_norm`, as in Jamba.

    Source:
        arXiv:2312.00752 section 3; norms arXiv:2403.19887.
    """
    N, width = cfg.mamba1_state, cfg.mamba1_width
    x_MC, z_MC = F.linear(u_MD, params.in_proj, params.in_proj_bias).split([width, width], -1)
    x_BTC, conv = _convolution(params, x_MC, None if state is None else state.conv, context, scope)
    x_MC = x_BTC.reshape(-1, width)
    dt_MR, B_MN, C_MN = F.linear(x_MC, params.x_proj).split([cfg.dt_rank, N, N], -1)
    if params.dt_norm is not None and params.B_norm is not None and params.C_norm is not None:
        pairs = ((dt_MR, params.dt_norm), (B_MN, params.B_norm), (C_MN, params.C_norm))
        dt_MR, B_MN, C_MN = (rms_norm(value, weight, cfg.norm_eps) for value, weight in pairs)
    dt_MC = F.softplus(F.linear(dt_MR, params.dt_proj, params.dt_bias).to(params.A_log.dtype))
    dt_BTC, B_BTN, C_BTN = (part.reshape(context.batch, context.tokens, -1) for part in (dt_MC, B_MN, C_MN))
    inputs = (x_BTC, dt_BTC, -torch.exp(params.A_log), B_BTN, C_BTN)
    scan = None if state is None else state.scan
    if context.in_place and scan is not None:
        y_BTC, new_BCN = ops.selective_scan_(*inputs, scan, context.valid_B), scan
    else:
        y_BTC, new_BCN = ops.selective_scan(*inputs, scan, context.valid_B)
    context.tap(scope, "selective_scan", y_BTC, new_BCN)
    y_MC = (y_BTC.reshape(-1, width) + x_MC * params.D) * F.silu(z_MC)
    return F.linear(y_MC, params.out_proj, params.out_proj_bias), None if state is None else Mamba1State(conv, new_BCN)
