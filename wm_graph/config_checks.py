"""What a ModelConfig may hold. Needs no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from wm_graph.errors import ConfigError

if TYPE_CHECKING:
    from wm_graph.config import ModelConfig

MIXERS = ("ssd", "mamba2", "mamba1", "attention", "dynamic_mask_attention", "inner_function_attention")
FEED_FORWARDS = ("mlp", "moe", "cdmoe", "none")
# Fields that name a form, and their forms; the first is the default.
FORMS = {
    "dma_mask": ("keep_window", "log", "additive", "binary", "ratio"),
    "dma_heads": ("kv", "query"),
    "ifa_form": ("topk_sum", "top1", "softmax"),
    "ifa_mask": ("none", "static_hard", "static_ste"),
    "cdmoe_form": ("c2", "c1_parallel", "c1_serial", "single_head"),
    "moe_form": ("gated", "shared_expert_isolated"),
    "rope_scaling": ("none", "linear", "llama3", "dynamic"),
}

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}
# Numbers that may be 0: what they size is absent, or has its default.
_MAY_BE_ZERO = ("n_expert", "n_retrieval_head", "n_pick", "d_retrieval", "rotary_dim", "dt_min", "dt_max", "dma_ratio")


def check_config(cfg: ModelConfig) -> None:
    """Raise ConfigError, naming the field, unless the configuration describes a model."""
    _check_types(cfg)
    _check_sizes(cfg)
    _check_forms(cfg)
    _check_layers(cfg)
    mixers, feed_forwards = ({pair[place] for pair in cfg.layers} for place in (0, 1))
    _check_rotation(cfg, mixers)
    if mixers & {"mamba1", "mamba2"}:
        _check_convolution(cfg)
    if "dynamic_mask_attention" in mixers:
        _check_dynamic_mask(cfg)
    if "inner_function_attention" in mixers:
        _check_inner_function(cfg)
    if "cdmoe" in feed_forwards:
        _check_cdmoe(cfg)
    if "moe" in feed_forwards:
        _check_moe(cfg)


def check_cache(cfg: ModelConfig) -> None:
    """Raise ConfigError where a state would hold what a longer sequence turns by other angles, unless the configuration allows it."""
    _check_that(
        cfg.rope_scaling != "dynamic" or cfg.rope_dynamic_cache,
        "rope_scaling is 'dynamic' with a state, whose keys keep the angles of earlier lengths; "
        "set rope_dynamic_cache to true in config.json to allow it, or run forward without a state",
    )


def _check_that(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(f"ModelConfig: {message}")


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def _check_types(cfg: ModelConfig) -> None:
    for field in dataclasses.fields(cfg):
        allowed = _PYTHON_TYPES.get(_type_name(field.type))
        if allowed is None:
            continue
        value = getattr(cfg, field.name)
        if not isinstance(value, allowed) or (isinstance(value, bool) and allowed != (bool,)):
            raise ConfigError(f"ModelConfig: {field.name} is {value!r}, expected a value of type {allowed[0].__name__}")


def _check_sizes(cfg: ModelConfig) -> None:
    for field in dataclasses.fields(cfg):
        value, kind = getattr(cfg, field.name), _type_name(field.type)
        least = 0 if field.name in _MAY_BE_ZERO else 1
        if kind == "int" and value < least:
            raise ConfigError(f"ModelConfig: {field.name} is {value}, expected at least {least}")
        if kind == "float" and not (0.0 < value < float("inf") or (value == 0.0 and least == 0)):
            raise ConfigError(f"ModelConfig: {field.name} is {value}, expected a positive finite number")
    _check_that(cfg.n_head % cfg.n_kv_head == 0, f"n_head {cfg.n_head} is not a multiple of n_kv_head {cfg.n_kv_head}")
    _check_that(cfg.ssd_head % cfg.ssd_group == 0, f"ssd_head {cfg.ssd_head} is not a multiple of ssd_group {cfg.ssd_group}")
    _check_that(not cfg.dt_max or cfg.dt_min <= cfg.dt_max, f"dt_min {cfg.dt_min} exceeds dt_max {cfg.dt_max}")
    _check_that(cfg.dma_ratio < 1, f"dma_ratio is {cfg.dma_ratio}, expected less than 1, a share of the keys")


def _check_forms(cfg: ModelConfig) -> None:
    for name, forms in FORMS.items():
        value = getattr(cfg, name)
        _check_that(value in forms, f"{name} is {value!r}, expected one of {', '.join(forms)}")


def _check_layers(cfg: ModelConfig) -> None:
    _check_that(bool(cfg.layers), "layers is empty, expected at least one (mixer, feed_forward) pair")
    for mixer, feed_forward in cfg.layers:
        _check_that(mixer in MIXERS, f"unknown mixer {mixer!r}; choose one of {', '.join(MIXERS)}")
        _check_that(feed_forward in FEED_FORWARDS, f"unknown feed-forward {feed_forward!r}; choose one of {', '.join(FEED_FORWARDS)}")


def _check_rotation(cfg: ModelConfig, mixers: set[str]) -> None:
    for mixer in sorted(mixers):
        width = cfg.rotary_width(mixer)
        name = "ssd_state" if mixer in ("ssd", "mamba2") else ("rotary_dim" if cfg.rotary_dim else "head_dim")
        _check_that(width % 2 == 0, f"{name} {width} is odd; RoPE rotates pairs, use an even width")
    _check_that(cfg.rotary_dim <= cfg.head_dim, f"rotary_dim {cfg.rotary_dim} exceeds head_dim {cfg.head_dim}")
    _check_that(
        cfg.rope_scaling != "llama3" or cfg.rope_low < cfg.rope_high, f"rope_low {cfg.rope_low} is not below rope_high {cfg.rope_high}"
    )


def _check_convolution(cfg: ModelConfig) -> None:
    _check_that(cfg.conv_size >= 2, f"conv_size is {cfg.conv_size}, a convolution of mamba1 or mamba2 layers has at least 2 taps")


def _check_dynamic_mask(cfg: ModelConfig) -> None:
    _check_that(
        cfg.dma_heads == "kv" or not cfg.keeps_window,
        f"dma_heads is 'query' with dma_mask {cfg.dma_mask!r}, whose window is kept per kv head; use dma_heads 'kv'",
    )
    _check_that(
        (cfg.dma_ratio > 0) == (cfg.dma_mask == "ratio"),
        f"dma_ratio is {cfg.dma_ratio} with dma_mask {cfg.dma_mask!r}; give one with the other",
    )


def _check_inner_function(cfg: ModelConfig) -> None:
    width = cfg.n_head * cfg.head_dim
    _check_that(
        width == cfg.d_model,
        f"n_head x head_dim is {width}, inner function attention needs d_model {cfg.d_model}: its values gate the input",
    )
    _check_that(cfg.ifa_pick <= cfg.ifa_value, f"ifa_pick {cfg.ifa_pick} exceeds ifa_value {cfg.ifa_value}, the vectors there are")
    single = cfg.ifa_head == cfg.ifa_pick == 1
    _check_that(cfg.ifa_form != "top1" or single, f"ifa_form top1 has one head and one pick, found {cfg.ifa_head} and {cfg.ifa_pick}")


def _check_cdmoe(cfg: ModelConfig) -> None:
    for name in ("n_expert", "n_retrieval_head", "n_pick", "d_retrieval"):
        unused = name == "d_retrieval" and cfg.cdmoe_form == "single_head"
        _check_that(unused or getattr(cfg, name) >= 1, f"{name} is {getattr(cfg, name)}, a cdmoe layer needs at least 1")
    _check_that(
        cfg.n_subkey**2 == cfg.n_expert,
        f"n_expert {cfg.n_expert} is not a perfect square, so experts past {int(cfg.n_expert**0.5) ** 2} "
        "could never be retrieved; use a square",
    )
    _check_that(cfg.n_pick <= cfg.n_subkey, f"n_pick {cfg.n_pick} exceeds the {cfg.n_subkey} sub-keys of a half")
    _check_that(cfg.d_retrieval % 2 == 0, f"d_retrieval {cfg.d_retrieval} is odd; it is split into two halves")
    if cfg.cdmoe_form == "single_head":
        _check_that(cfg.n_retrieval_head == 1, f"n_retrieval_head is {cfg.n_retrieval_head}, cdmoe_form single_head has 1")


def _check_moe(cfg: ModelConfig) -> None:
    for name in ("n_expert", "n_pick"):
        _check_that(getattr(cfg, name) >= 1, f"{name} is {getattr(cfg, name)}, a moe layer needs at least 1")
    _check_that(cfg.n_pick <= cfg.n_expert, f"n_pick {cfg.n_pick} exceeds n_expert {cfg.n_expert}")
