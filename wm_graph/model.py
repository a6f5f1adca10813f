"""forward: the one entry to every model, prefill and decode alike.

B batch, T tokens, S selected positions, M = B·T, D model width, V vocabulary, F rotated pairs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from wm_graph.blocks import layer
from wm_graph.config import ModelConfig
from wm_graph.config_checks import check_cache
from wm_graph.context import Context, rms_norm
from wm_graph.params import Params
from wm_graph.state import LayerState, State
from wm_graph.taps import Taps

LayerFunction = Callable[[int, Tensor, LayerState | None, Context, Tensor | None], tuple[Tensor, LayerState | None]]


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Tensor,
    state: State | None = None,
    valid_B: Tensor | None = None,
    select_BS: Tensor | None = None,
    *,
    in_place: bool = False,
    taps: Taps | None = None,
) -> tuple[Tensor, State | None]:
    """Logits of the next token after each selected token, and the state after the call.

    Prefill is T > 1, decode is T = 1, a prompt may be given in any split. Nothing here synchronises with the device or checks values:
    sessions refuse bad ids and over-long input beforehand.

    Args:
        cfg: the model.
        params: its parameters.
        tokens_BT: int64 ids in 0..V-1, right-padded (padding: any id in range).
        state: what was seen before; None is the training path, plain causal attention without a cache.
        valid_B: int64, how many tokens of each row count, 0..T; None when all do. Later tokens change neither the state nor earlier logits.
        select_BS: int64 token indices in 0..T-1 whose logits are wanted; None for all.
        in_place: write into the given state's tensors instead of making new ones.
        taps: records every op output by name.

    Returns:
        (logits_BSV in float32 (float64 for a float64 model), new state or None).

    Raises:
        ConfigError: a state is given to a model of dynamic RoPE scaling that does not allow it.
        RuntimeError: shapes disagree; the message names the op.
    """

    def run(
        index: int, x_MD: Tensor, layer_state: LayerState | None, context: Context, select_BS: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        return layer(cfg, params.layers[index], x_MD, layer_state, context, f"layers.{index}", select_BS)

    head = params.embedding if params.head is None else params.head
    return run_model(cfg, (params.embedding, params.norm, head), run, tokens_BT, state, valid_B, select_BS, in_place=in_place, taps=taps)


def run_model(
    cfg: ModelConfig,
    ends: tuple[Tensor, Tensor, Tensor],
    run_layer: LayerFunction,
    tokens_BT: Tensor,
    state: State | None,
    valid_B: Tensor | None,
    select_BS: Tensor | None,
    *,
    in_place: bool = False,
    taps: Taps | None = None,
) -> tuple[Tensor, State | None]:
    """`forward` around any way of running a layer: `ends` are embedding_VD, norm_D and head_VD."""
    embedding_VD, norm_D, head_VD = ends
    context = make_context(cfg, tokens_BT, state, valid_B, embedding_VD.dtype, in_place=in_place, taps=taps)
    x_MD = F.embedding(tokens_BT.reshape(-1), embedding_VD)
    layer_states: list[LayerState | None] = []
    for index in range(len(cfg.layers)):
        # Only the last layer may drop tokens: in the others, later layers mix all of them.
        wanted_BS = select_BS if index == len(cfg.layers) - 1 else None
        x_MD, layer_state = run_layer(index, x_MD, None if state is None else state.layers[index], context, wanted_BS)
        layer_states.append(layer_state)
    logits_MV = F.linear(rms_norm(x_MD, norm_D, cfg.norm_eps), head_VD)
    logits_BSV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)).reshape(context.batch, -1, cfg.vocab_size)
    return logits_BSV, None if state is None else next_state(state, layer_states, context)


def make_context(
    cfg: ModelConfig,
    tokens_BT: Tensor,
    state: State | None,
    valid_B: Tensor | None,
    dtype: torch.dtype,
    *,
    in_place: bool = False,
    taps: Taps | None = None,
) -> Context:
    """What the layers share: sizes, positions and rotary angles for every rotated width of the model."""
    batch, tokens = tokens_BT.shape
    position_BT = torch.arange(tokens, device=tokens_BT.device).expand(batch, tokens)
    if state is not None:
        check_cache(cfg)
        position_BT = position_BT + state.position.unsqueeze(-1)
    widths = dict.fromkeys(width for mixer, _ in cfg.layers if (width := cfg.rotary_width(mixer)))
    length_B = _length(position_BT, valid_B) if cfg.rope_scaling == "dynamic" else None
    scaling = (length_B, cfg.rope_scaling, cfg.rope_factor, cfg.rope_original, cfg.rope_low, cfg.rope_high)
    angles: dict[int, tuple[Tensor, Tensor]] = {}
    for width in widths:
        angles[width] = ops.rope_angles(position_BT, width // 2, cfg.rope_theta, dtype == torch.float64, *scaling)
        if taps is not None:
            taps.record("", "rope_angles", angles[width])
    return Context(batch, tokens, position_BT, None if state is None else state.position, valid_B, angles, in_place, taps)


def _length(position_BT: Tensor, valid_B: Tensor | None) -> Tensor:
    """Tokens of each row up to the end of this call, padding apart."""
    return position_BT[:, 0] + (position_BT.shape[1] if valid_B is None else valid_B)


def next_state(state: State, layer_states: list[LayerState | None], context: Context) -> State:
    """The state after the call: new layer states, positions advanced by the tokens that count."""
    step_B: Tensor | int = context.tokens if context.valid_B is None else context.valid_B
    layers = tuple(item for item in layer_states if item is not None)
    if context.in_place:
        state.position.add_(step_B)
        return State(state.position, layers)
    return State(state.position + step_B, layers)
