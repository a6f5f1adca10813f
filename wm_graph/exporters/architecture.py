"""Which Hugging Face architecture a configuration is: the one whose config.json, written and read again, says the same."""

from dataclasses import fields
from typing import Any

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError, ExportError
from wm_graph.importers.families import FAMILIES
from wm_graph.importers.family import Family, read_config, write_config
from wm_graph.importers.fields import Fields

_ATTENTION = {"attention", "dynamic_mask_attention", "inner_function_attention"}
_ROUTED = {"moe", "cdmoe"}
# What a field's name begins with -> the mixers and feed-forwards that read it. The first that fits counts; a field of none is always read.
_READERS: dict[str, set[str]] = {
    "ssd_": {"ssd", "mamba2"},
    "conv_": {"mamba1", "mamba2"},
    "mamba_": {"mamba1", "mamba2"},
    "dt_rank": {"mamba1"},
    "dt_": {"mamba2"},
    "mamba1_": {"mamba1"},
    "keep_window": {"dynamic_mask_attention"},
    "dma_": {"dynamic_mask_attention"},
    "ifa_": {"inner_function_attention"},
    "d_ifa": {"inner_function_attention"},
    "d_ff": {"mlp", *_ROUTED},
    "mlp_bias": {"mlp"},
    "n_expert": _ROUTED,
    "n_pick": _ROUTED,
    "n_retrieval_head": {"cdmoe"},
    "d_retrieval": {"cdmoe"},
    "cdmoe_": {"cdmoe"},
    "moe_": {"moe"},
    "n_head": _ATTENTION,
    "n_kv_head": _ATTENTION,
    "head_dim": _ATTENTION,
    "attention_": _ATTENTION,
    "rotary_dim": _ATTENTION,
    "qk_norm": _ATTENTION,
}
# Scaled frequencies -> the fields of that scaling.
_SCALING = {"none": set(), "linear": {"factor"}, "dynamic": {"factor", "original", "dynamic_cache"}}
_SCALING["llama3"] = {"factor", "original", "low", "high"}


def find_architecture(cfg: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The architecture of a model and the fields of its config.json.

    Raises:
        ExportError: no architecture describes the model; the message says what stands in the way.
    """
    mixers, feed_forwards = ({pair[place] for pair in cfg.layers} for place in (0, 1))
    fitting = [family for family in FAMILIES.values() if mixers <= {*family.mixers} and feed_forwards <= {*family.feed_forwards}]
    if not fitting:
        known = "; ".join(f"{family.kind}: {'/'.join(family.mixers)} + {'/'.join(family.feed_forwards)}" for family in FAMILIES.values())
        raise ExportError(
            f"no Hugging Face architecture has layers of {'/'.join(sorted(mixers))} + {'/'.join(sorted(feed_forwards))}; there are {known}"
        )
    obstacles = []
    for family in fitting:
        try:
            values = write_config(family, cfg)
            again = read_config(family, Fields("config.json", values), cfg.name)
        except CheckpointError as error:
            obstacles.append(f"{family.kind}: {error}")
            continue
        differing = [name for name in _read_fields(cfg) if getattr(cfg, name) != getattr(again, name)]
        if not differing:
            return family, values
        obstacles.append(f"{family.kind}: {_obstacle(differing[0], cfg, again)}")
    raise ExportError(f"no Hugging Face architecture describes {cfg.name!r}; {'; '.join(obstacles)}")


def _obstacle(name: str, cfg: ModelConfig, again: ModelConfig) -> str:
    if name == "layers":
        return "its layers come in another order"
    return f"{name} is {getattr(cfg, name)!r}, there it is {getattr(again, name)!r}"


def _read_fields(cfg: ModelConfig) -> list[str]:
    """The fields of a configuration that its model depends on."""
    kinds = {kind for pair in cfg.layers for kind in pair}
    rotates = any(cfg.rotary_width(mixer) for mixer, _ in cfg.layers)

    def is_read(name: str) -> bool:
        if name.startswith("rope_"):
            part = name.removeprefix("rope_")
            return rotates and (part in ("theta", "scaling") or part in _SCALING[cfg.rope_scaling])
        readers = next((readers for start, readers in _READERS.items() if name.startswith(start)), kinds)
        return not readers.isdisjoint(kinds)

    return [field.name for field in fields(cfg) if is_read(field.name)]
