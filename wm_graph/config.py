"""ModelConfig: everything that is static about a model. Needs no torch."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from wm_graph.errors import ConfigError

MIXERS = ("ssd", "attention", "dynamic_mask_attention")
FEED_FORWARDS = ("mlp", "cdmoe")
MAX_POSITION = 2**24  # RoPE angles are exact up to here


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model: a pattern of (mixer, feed-forward) layers between an embedding and a head.

    Attributes:
        name: preset or import name, for people.
        vocab_size: tokens in the vocabulary (V).
        d_model: width of the residual stream (D).
        d_ff: hidden width of the gated MLP, and of CDMoE's shared MLP.
        layers: one (mixer, feed-forward) pair per layer; see `MIXERS` and `FEED_FORWARDS`.
        n_head: query heads of attention layers (H).
        n_kv_head: key/value heads (K); divides n_head.
        head_dim: width of one attention head (P).
        ssd_head: heads of SSD layers (H).
        ssd_head_dim: width of one SSD head (P).
        ssd_state: state size of one SSD head (N).
        ssd_group: groups that share B and C (G); divides ssd_head; head h uses group h // (ssd_head / ssd_group).
        ssd_rope: rotate C and B by position (2412.11834).
        keep_window: keys a dynamic-mask attention head keeps (W).
        qk_norm: RMS-normalise queries and keys before RoPE.
        learned_residual: scale the skip branch by a learned vector; False is the plain sum.
        tie_embeddings: the head is the embedding.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMS norm.
        n_expert: experts of a CDMoE layer (E), a perfect square.
        n_retrieval_head: product-key heads (R).
        n_pick: experts per retrieval head and token (k).
        d_retrieval: width of one head's query, two halves of d_retrieval / 2 (r = 2d).
    """

    name: str
    vocab_size: int
    d_model: int
    d_ff: int
    layers: tuple[tuple[str, str], ...]
    n_head: int
    n_kv_head: int
    head_dim: int
    ssd_head: int = 1
    ssd_head_dim: int = 1
    ssd_state: int = 1
    ssd_group: int = 1
    ssd_rope: bool = True
    keep_window: int = 2048
    qk_norm: bool = False
    learned_residual: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    n_expert: int = 0
    n_retrieval_head: int = 0
    n_pick: int = 0
    d_retrieval: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_sizes(self)
        _check_layers(self)
        if any(feed_forward == "cdmoe" for _, feed_forward in self.layers):
            _check_cdmoe(self)

    @property
    def n_subkey(self) -> int:
        """Sub-keys per retrieval head and half: J = sqrt(E)."""
        return round(self.n_expert**0.5)

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


_PYTHON_TYPES: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (float, int), bool: (bool,)}


def _check_types(cfg: ModelConfig) -> None:
    for field in dataclasses.fields(cfg):
        allowed = _PYTHON_TYPES.get(field.type)
        if allowed is None:
            continue
        value = getattr(cfg, field.name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
            raise ConfigError(f"ModelConfig: {field.name} is {value!r}, expected a value of type {allowed[0].__name__}")


def _check_sizes(cfg: ModelConfig) -> None:
    optional = {"n_expert", "n_retrieval_head", "n_pick", "d_retrieval"}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type is int and value < (0 if field.name in optional else 1):
            raise ConfigError(f"ModelConfig: {field.name} is {value}, expected at least {0 if field.name in optional else 1}")
        if field.type is float and not 0.0 < value < float("inf"):
            raise ConfigError(f"ModelConfig: {field.name} is {value}, expected a positive finite number")
    if cfg.n_head % cfg.n_kv_head:
        raise ConfigError(f"ModelConfig: n_head {cfg.n_head} is not a multiple of n_kv_head {cfg.n_kv_head}")
    if cfg.ssd_head % cfg.ssd_group:
        raise ConfigError(f"ModelConfig: ssd_head {cfg.ssd_head} is not a multiple of ssd_group {cfg.ssd_group}")


def _check_layers(cfg: ModelConfig) -> None:
    if not cfg.layers:
        raise ConfigError("ModelConfig: layers is empty, expected at least one (mixer, feed_forward) pair")
    for mixer, feed_forward in cfg.layers:
        if mixer not in MIXERS:
            raise ConfigError(f"ModelConfig: unknown mixer {mixer!r}; choose one of {', '.join(MIXERS)}")
        if feed_forward not in FEED_FORWARDS:
            raise ConfigError(f"ModelConfig: unknown feed-forward {feed_forward!r}; choose one of {', '.join(FEED_FORWARDS)}")
    mixers = {mixer for mixer, _ in cfg.layers}
    if mixers - {"ssd"} and cfg.head_dim % 2:
        raise ConfigError(f"ModelConfig: head_dim {cfg.head_dim} is odd; RoPE rotates pairs, use an even width")
    if "ssd" in mixers and cfg.ssd_rope and cfg.ssd_state % 2:
        raise ConfigError(f"ModelConfig: ssd_state {cfg.ssd_state} is odd; RoPE rotates pairs, use an even size")


def _check_cdmoe(cfg: ModelConfig) -> None:
    for name in ("n_expert", "n_retrieval_head", "n_pick", "d_retrieval"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"ModelConfig: {name} is {getattr(cfg, name)}, a cdmoe layer needs at least 1")
    if cfg.n_subkey**2 != cfg.n_expert:
        raise ConfigError(
            f"ModelConfig: n_expert {cfg.n_expert} is not a perfect square, so experts past {int(cfg.n_expert**0.5) ** 2} "
            "could never be retrieved; use a square"
        )
    if cfg.n_pick > cfg.n_subkey:
        raise ConfigError(f"ModelConfig: n_pick {cfg.n_pick} exceeds the {cfg.n_subkey} sub-keys of a half")
    if cfg.d_retrieval % 2:
        raise ConfigError(f"ModelConfig: d_retrieval {cfg.d_retrieval} is odd; it is split into two halves")
