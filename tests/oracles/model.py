"""The whole model, one token at a time.

T tokens, V vocabulary, D model width, F rotated pairs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from oracles.attention_layers import Attention, DynamicMaskAttention, InnerFunctionAttention
from oracles.feed_forwards import feed_forward
from oracles.functions import Array, rms_norm
from oracles.rotation import Scaling, angles
from oracles.scan_layers import Mamba1, Mamba2, Ssd, Token
from wm_graph.config import ModelConfig

Weights = Mapping[str, Array]


class Mixer(Protocol):
    """Sees the tokens one after the other and remembers of them what it needs."""

    def step(self, u_D: Array, token: Token) -> Array: ...


class MixerMaker(Protocol):
    def __call__(self, cfg: ModelConfig, weights: Weights) -> Mixer: ...


MIXERS: dict[str, MixerMaker] = {
    "ssd": Ssd,
    "mamba2": Mamba2,
    "mamba1": Mamba1,
    "attention": Attention,
    "dynamic_mask_attention": DynamicMaskAttention,
    "inner_function_attention": InnerFunctionAttention,
}


class Notes:
    """What each op of wm would give for each token: `layers.3.attention.out` -> one array per token.

    A second call of an op by the same layer for the same token is `layers.3.router_topk.1.weight`. Of a scan's or convolution's `state`
    and of a window's slots (in the order of their positions) an entry is the state after the token; of `k`, `v` and `score` of a cache it
    is the cell that the token fills.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[np.ndarray]] = {}
        self._calls: dict[str, int] = {}

    def next_token(self) -> None:
        self._calls.clear()

    def write(self, scope: str, op: str, **outputs: Any) -> None:
        call = f"{scope}.{op}" if scope else op
        count = self._calls.get(call, 0)
        self._calls[call] = count + 1
        for output, value in outputs.items():
            name = f"{call}.{count}.{output}" if count else f"{call}.{output}"
            self.values.setdefault(name, []).append(np.array(value))


class Layer:
    """y = r1 ⊙ x + mixer(RMSNorm(x)),   z = r2 ⊙ y + feed_forward(RMSNorm(y)).

    The scales r of the skip branches are learned (arXiv:2412.11834) or 1; a layer without a feed-forward ends at y.
    """

    def __init__(self, cfg: ModelConfig, index: int, weights: Weights) -> None:
        self.cfg, self.weights = cfg, weights
        mixer, self.feed_forward = cfg.layers[index]
        self.mixer = MIXERS[mixer](cfg, below(weights, "mixer"))

    def step(self, x_D: Array, token: Token) -> Array:
        cfg, weights = self.cfg, self.weights
        mixed_D = self.mixer.step(rms_norm(x_D, weights["mixer_norm"], cfg.norm_eps), token)
        y_D = mixed_D + (weights["mixer_residual"] * x_D if cfg.learned_residual else x_D)
        if self.feed_forward == "none":
            return y_D
        normed_D = rms_norm(y_D, weights["feed_forward_norm"], cfg.norm_eps)
        token.note("residual_rms_norm", normed=normed_D, sum=y_D)
        out_D = feed_forward(self.feed_forward, cfg, below(weights, "feed_forward"), normed_D, token.note)
        return out_D + (weights["feed_forward_residual"] * y_D if cfg.learned_residual else y_D)


def model_logits(cfg: ModelConfig, params: Weights, tokens_T: Sequence[int], notes: Notes | None = None) -> Array:
    """Logits [T, V] after each token of one row, computed token by token in float64.

    embedding of the id -> layers -> RMSNorm -> head, which is the embedding again where they are tied.

    Args:
        cfg: the model.
        params: flat name, such as `layers.3.mixer.qkv`, -> float64 array.
        tokens_T: ids of the row. Dynamic RoPE scaling turns all of them by the angles of a text of T tokens.
        notes: writes down op outputs.
    """
    notes = Notes() if notes is None else notes
    layers = [Layer(cfg, index, below(params, f"layers.{index}")) for index in range(len(cfg.layers))]
    head_VD = params["embedding"] if cfg.tie_embeddings else params["head"]
    logits_TV = np.zeros((len(tokens_T), len(head_VD)))
    for position, token_id in enumerate(tokens_T):
        notes.next_token()
        turns = rotations(cfg, position, len(tokens_T), notes)
        x_D = params["embedding"][token_id]
        for index, layer in enumerate(layers):
            x_D = layer.step(x_D, Token(position, turns, partial(notes.write, f"layers.{index}")))
        logits_TV[position] = head_VD @ rms_norm(x_D, params["norm"], cfg.norm_eps)
    return logits_TV


def rotations(cfg: ModelConfig, position: int, length: int, notes: Notes) -> dict[int, tuple[Array, Array]]:
    """(cos_F, sin_F) of a position for each width that some layer rotates, in the order of the layers."""
    scaling = Scaling(cfg.rope_scaling, cfg.rope_factor, cfg.rope_original, cfg.rope_low, cfg.rope_high)
    turns: dict[int, tuple[Array, Array]] = {}
    for mixer, _ in cfg.layers:
        width = 0
        if mixer in ("ssd", "mamba2") and cfg.ssd_rope:
            width = cfg.ssd_state  # C and B are as wide as the state
        if mixer.endswith("attention") and cfg.attention_rope:
            width = cfg.rotary_dim or cfg.head_dim
        if width and width not in turns:
            turns[width] = angles(position, width // 2, cfg.rope_theta, scaling, length)
            notes.write("", "rope_angles", cos=turns[width][0], sin=turns[width][1])
    return turns


def below(params: Weights, prefix: str) -> dict[str, Array]:
    """The parameters whose name starts with `prefix` and a dot, by the rest of their name."""
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(f"{prefix}.")}
