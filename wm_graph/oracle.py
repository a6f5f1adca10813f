"""The float64 oracle of a whole model: the references in float64, one layer's parameters at a time so that memory stays small."""

import torch
from torch import Tensor

from wm_graph.blocks import layer
from wm_graph.config import ModelConfig
from wm_graph.context import Context
from wm_graph.model import run_model
from wm_graph.params import Params, cast_params
from wm_graph.state import LayerState, State
from wm_graph.taps import Taps


@torch.no_grad()
def oracle_forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Tensor,
    state: State | None = None,
    valid_B: Tensor | None = None,
    select_BS: Tensor | None = None,
    *,
    taps: Taps | None = None,
) -> tuple[Tensor, State | None]:
    """`forward` with every parameter cast to float64 (from the values the model really holds) and all arithmetic in float64.

    Args:
        cfg: the model.
        params: its parameters in any float dtype.
        tokens_BT: int64 ids.
        state: a float64 state (`zero_state(..., dtype=torch.float64)`), or None.
        valid_B: tokens of each row that count.
        select_BS: token indices whose logits are wanted; None for all.
        taps: records op outputs, and replays another runtime's choices.

    Returns:
        (logits_BSV float64, state).
    """

    def run(
        index: int, x_MD: Tensor, layer_state: LayerState | None, context: Context, wanted_BS: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        params_64 = cast_params(params.layers[index], torch.float64)
        return layer(cfg, params_64, x_MD, layer_state, context, f"layers.{index}", wanted_BS)

    embedding_VD = params.embedding.double()
    ends = (embedding_VD, params.norm.double(), embedding_VD if params.head is None else params.head.double())
    return run_model(cfg, ends, run, tokens_BT, state, valid_B, select_BS, taps=taps)
