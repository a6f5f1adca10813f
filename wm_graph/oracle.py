"""The float64 oracle of a whole model: the references in float64, one layer's parameters at a time so that memory stays small."""

from typing import Any

import torch
from torch import Tensor

from wm_graph.blocks import layer
from wm_graph.config import ModelConfig
from wm_graph.context import Context
from wm_graph.model import run_model
from wm_graph.params import Params, cast_params, is_float32_always, map_tensors
from wm_graph.state import LayerState, State
from wm_graph.taps import Taps
from wm_graph.tolerances import UNIT_ROUNDOFF


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
    noise: float = 0.0,
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
        noise: every parameter is moved by at most this share of itself, the same way in every call. With a dtype's u, the logits then move
            as far as the model makes of a rounding of each weight; no other code than the references has a part in it.

    Returns:
        (logits_BSV float64, state).
    """

    def run(
        index: int, x_MD: Tensor, layer_state: LayerState | None, context: Context, wanted_BS: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        params_64 = _moved(cast_params(params.layers[index], torch.float64), noise, index)
        return layer(cfg, params_64, x_MD, layer_state, context, f"layers.{index}", wanted_BS)

    embedding_VD, norm_D, head_VD = (
        None if end is None else _moved(end.double(), noise, len(params.layers) + place)
        for place, end in enumerate((params.embedding, params.norm, params.head))
    )
    assert embedding_VD is not None
    assert norm_D is not None
    ends = (embedding_VD, norm_D, embedding_VD if head_VD is None else head_VD)
    return run_model(cfg, ends, run, tokens_BT, state, valid_B, select_BS, taps=taps)


def _moved(node: Any, noise: float, seed: int) -> Any:
    """A float64 parameter (sub)tree, each number times 1 + noise · r, r uniform in -1 .. 1."""
    if not noise:
        return node
    generator = torch.Generator().manual_seed(seed)

    def move(name: str, tensor: Tensor) -> Tensor:
        share = min(noise, UNIT_ROUNDOFF["float32"]) if is_float32_always(name) else noise
        return tensor * (1 + share * (2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1))

    return map_tensors(node, move)
