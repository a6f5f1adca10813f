"""A layer as a pure function: (cfg, params, x_MD, state, context) -> (x_MD, state).

B batch, T tokens, M = B·T, D model width, S selected positions. Hidden states stay flat, x_MD, so that linear layers are 2-D products.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.attentions import attention, dynamic_mask_attention, inner_function_attention
from wm_graph.config import ModelConfig
from wm_graph.context import Context, rms_norm
from wm_graph.feed_forwards import feed_forward
from wm_graph.params import (
    AttentionParams,
    DynamicMaskAttentionParams,
    InnerFunctionAttentionParams,
    LayerParams,
    Mamba1Params,
    Mamba2Params,
    Mixer,
    SsdParams,
)
from wm_graph.scans import mamba1, mamba2, ssd
from wm_graph.state import LayerState

_MIXERS: dict[type[Mixer], Callable[..., Any]] = {
    SsdParams: ssd,
    Mamba2Params: mamba2,
    Mamba1Params: mamba1,
    AttentionParams: attention,
    DynamicMaskAttentionParams: dynamic_mask_attention,
    InnerFunctionAttentionParams: inner_function_attention,
}


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

    A layer without a feed-forward ends at y.

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
    mixed_MD, state = _MIXERS[type(params.mixer)](cfg, params.mixer, normed_MD, state, context, scope)
    if select_BS is not None:
        x_MD, mixed_MD = (select_tokens(part_MD, select_BS, context.tokens) for part_MD in (x_MD, mixed_MD))
        context = replace(context, tokens=select_BS.shape[1])
    if params.feed_forward is None or params.feed_forward_norm is None:
        return mixed_MD + _scaled(x_MD, params.mixer_residual), state
    normed_MD, y_MD = ops.residual_rms_norm(mixed_MD, x_MD, params.mixer_residual, params.feed_forward_norm, cfg.norm_eps)
    context.tap(scope, "residual_rms_norm", normed_MD, y_MD)
    out_MD = feed_forward(cfg, params.feed_forward, normed_MD, context, scope)
    return out_MD + _scaled(y_MD, params.feed_forward_residual), state


def _scaled(x_MD: Tensor, scale_D: Tensor | None) -> Tensor:
    return x_MD if scale_D is None else scale_D * x_MD


def select_tokens(x_MD: Tensor, select_BS: Tensor, tokens: int) -> Tensor:
    """The rows of x_MD that `select_BS` names, flat in (b, s) order."""
    row_B = torch.arange(select_BS.shape[0], device=select_BS.device) * tokens
    return F.embedding((select_BS + row_B.unsqueeze(-1)).reshape(-1), x_MD)
