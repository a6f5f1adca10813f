"""ModelConfig: everything that is static about a model. Needs no torch."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from wm_graph.config_checks import FEED_FORWARDS, FORMS, MIXERS, check_config
from wm_graph.errors import ConfigError

__all__ = ["FEED_FORWARDS", "FORMS", "MAX_POSITION", "MIXERS", "ModelConfig"]

MAX_POSITION = 2**24  # RoPE angles are exact up to here


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model: a pattern of (mixer, feed-forward) layers between an embedding and a head.

    Attributes:
        name: preset or import name, for people.
        vocab_size: tokens in the vocabulary (V).
        d_model: width of the residual stream (D).
        d_ff: hidden width of the gated MLP, of CDMoE's shared MLP and of each routed expert of a moe layer.
        layers: one (mixer, feed-forward) pair per layer; see `MIXERS` and `FEED_FORWARDS`.
        n_head: query heads of attention layers (H).
        n_kv_head: key/value heads (K); divides n_head. Inner function attention has a value per query head and ignores it.
        head_dim: width of one attention head (P).
        attention_rope: rotate queries and keys of attention layers by position; Jamba does not.
        rotary_dim: leading features of an attention head that are rotated; 0 is all of them.
        attention_bias: the projections of attention layers have biases.
        qk_norm: RMS-normalise queries and keys before RoPE.
        ssd_head: heads of ssd and mamba2 layers (H).
        ssd_head_dim: width of one such head (P).
        ssd_state: state size of one such head (N).
        ssd_group: groups that share B and C (G); divides ssd_head; head h uses group h // (ssd_head / ssd_group).
        ssd_rope: rotate C and B of ssd and mamba2 layers by position (2412.11834).
        conv_size: taps of the convolution of mamba1 and mamba2 layers (L).
        conv_bias: that convolution has a bias.
        mamba_bias: the input and output projections of mamba1 and mamba2 layers have biases.
        dt_min: least step size of a mamba2 layer, after softplus.
        dt_max: largest step size of a mamba2 layer; 0 is no limit.
        mamba1_width: channels of a mamba1 layer (C).
        mamba1_state: state size of one channel (N).
        dt_rank: width from which a mamba1 layer makes its step sizes.
        mamba1_norm: RMS-normalise dt, B and C of mamba1 layers, as Jamba does.
        keep_window: keys a dynamic-mask attention head keeps (W), where `dma_mask` is keep_window or log.
        dma_mask: what a key's score does. keep_window: keep the W best keys, add exp(A softplus(dt)); log: the same, add A softplus(dt);
            additive: add exp(A softplus(dt)); binary: hide keys whose exp(A softplus(dt)) < 1; ratio: additive, and hide the lowest
            `dma_ratio` of the visible keys.
        dma_heads: scores per kv head or per query head; only kv where the window is kept.
        dma_ratio: share of the visible keys that are hidden, where `dma_mask` is ratio.
        ifa_form: inner function of inner function attention: sum of the k best value vectors per retrieval head, the one best, or the k
            best weighted by a softmax.
        ifa_mask: static mask over (head, position): none, hidden where the parameter is exactly 0, or rounded with a straight-through
            gradient.
        ifa_value: value vectors of an inner function attention layer.
        ifa_head: retrieval heads of its inner function.
        ifa_pick: vectors per retrieval head and token.
        d_ifa: width of one retrieval head.
        ifa_positions: positions that the static mask covers, an upper limit of the capacity.
        learned_residual: scale the skip branch by a learned vector; False is the plain sum.
        tie_embeddings: the head is the embedding.
        mlp_bias: the linear layers of mlp feed-forwards have biases.
        rope_theta: base of the rotary frequencies.
        rope_scaling: none; linear: positions over `rope_factor`; llama3: low frequencies over `rope_factor`; dynamic: NTK, a base that
            grows with the sequence past `rope_original`.
        rope_factor: the factor of the scaling.
        rope_original: length the model was trained at, for llama3 and dynamic scaling.
        rope_low: llama3's low_freq_factor.
        rope_high: llama3's high_freq_factor.
        rope_dynamic_cache: allow dynamic scaling together with a state. Keys and states from earlier calls keep the angles of their time,
            so that a prompt in pieces differs from the whole.
        norm_eps: epsilon of every RMS norm.
        n_expert: experts of a cdmoe layer, a perfect square, or of a moe layer (E).
        n_retrieval_head: product-key heads (R).
        n_pick: experts per retrieval head and token, or per token of a moe layer (k).
        d_retrieval: width of one head's query, two halves of d_retrieval / 2 (r = 2d).
        cdmoe_form: c2: gated shared MLP, weights outside the activation (2412.11834); c1_parallel, c1_serial: plain shared MLP, weights
            inside (2407.16958); single_head: c2 with both halves' scores straight from a linear layer.
        moe_form: gated experts, or plain experts with biases beside a gated shared one.
        moe_normalize: divide a moe layer's weights by their sum over the experts picked.
    """

    name: str
    vocab_size: int
    d_model: int
    d_ff: int
    layers: tuple[tuple[str, str], ...]
    n_head: int
    n_kv_head: int
    head_dim: int
    attention_rope: bool = True
    rotary_dim: int = 0
    attention_bias: bool = False
    qk_norm: bool = False
    ssd_head: int = 1
    ssd_head_dim: int = 1
    ssd_state: int = 1
    ssd_group: int = 1
    ssd_rope: bool = True
    conv_size: int = 4
    conv_bias: bool = True
    mamba_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = 0.0
    mamba1_width: int = 1
    mamba1_state: int = 1
    dt_rank: int = 1
    mamba1_norm: bool = False
    keep_window: int = 2048
    dma_mask: str = "keep_window"
    dma_heads: str = "kv"
    dma_ratio: float = 0.0
    ifa_form: str = "topk_sum"
    ifa_mask: str = "none"
    ifa_value: int = 1
    ifa_head: int = 1
    ifa_pick: int = 1
    d_ifa: int = 1
    ifa_positions: int = 2048
    learned_residual: bool = False
    tie_embeddings: bool = True
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original: int = 2048
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_dynamic_cache: bool = False
    norm_eps: float = 1e-6
    n_expert: int = 0
    n_retrieval_head: int = 0
    n_pick: int = 0
    d_retrieval: int = 0
    cdmoe_form: str = "c2"
    moe_form: str = "gated"
    moe_normalize: bool = False

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def n_subkey(self) -> int:
        """Sub-keys per retrieval head and half: J = sqrt(E)."""
        return round(self.n_expert**0.5)

    @property
    def n_score_head(self) -> int:
        """Scores per key of a dynamic-mask attention layer (A)."""
        return self.n_kv_head if self.dma_heads == "kv" else self.n_head

    @property
    def keeps_window(self) -> bool:
        """Dynamic-mask attention layers keep a window of keys, not a cache of all."""
        return self.dma_mask in ("keep_window", "log")

    @property
    def max_position(self) -> int:
        """Most tokens that a row may hold."""
        masked = self.ifa_mask != "none" and any(mixer == "inner_function_attention" for mixer, _ in self.layers)
        return min(MAX_POSITION, self.ifa_positions) if masked else MAX_POSITION

    def rotary_width(self, mixer: str) -> int:
        """Features of a head that a layer rotates by position; 0 where it rotates none."""
        if mixer in ("ssd", "mamba2"):
            return self.ssd_state if self.ssd_rope else 0
        if mixer == "mamba1" or not self.attention_rope:
            return 0
        return self.rotary_dim or self.head_dim

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The configuration called `name`; `wm_graph.presets.PRESETS` lists them."""
        from wm_graph.presets import preset

        return preset(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"layers": [list(pair) for pair in self.layers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing, unknown, of the wrong type or out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"ModelConfig: expected a JSON object, got {type(values).__name__}; is this a config.json of wm-graph?")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"ModelConfig: unknown field {unknown[0]!r}; known fields are {', '.join(sorted(known))}")
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ConfigError(f"ModelConfig: field {missing[0]!r} is missing; add it to config.json")
        pairs = values["layers"]
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ConfigError("ModelConfig: 'layers' must be a list of [mixer, feed_forward] pairs")
        return cls(**(values | {"layers": tuple((pair[0], pair[1]) for pair in pairs)}))

    def to_json(self) -> str:
        """Indented JSON text, stable across runs."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: bad syntax, or a number of absurd length
            raise ConfigError(f"ModelConfig: not valid JSON ({str(error).splitlines()[0]}); write it with to_json") from error
        return cls.from_dict(values)
