"""RoPE in the metadata of others: the base of the rotary frequencies, and their scaling."""

from typing import Any

import numpy as np

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.importers.fields import Fields, clip

_TYPES = "no scaling (null, or the type 'default'), or the type 'linear', 'llama3' or 'dynamic'"


def read_rope(fields: Fields) -> dict[str, Any]:
    """The fields of ModelConfig about rotary frequencies, from a config.json of Hugging Face.

    They stand under `rope_theta` and `rope_scaling` or, since transformers 5, under `rope_parameters`; `rope_scaling` comes first.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for something that wm-graph does not have.
    """
    fields.require("partial_rotary_factor", 1.0)
    theta = fields.number("rope_theta", 10000.0)
    key, nested = _chosen(fields)
    nested.require("partial_rotary_factor", 1.0)
    found: dict[str, Any] = {"rope_theta": nested.number("rope_theta", theta)}
    kind = nested.values.get("rope_type", nested.values.get("type", "default"))
    if kind in ("default", "none"):
        return found
    if kind not in ("linear", "llama3", "dynamic"):
        raise fields.unsupported(key, _TYPES)
    found |= {"rope_scaling": kind, "rope_factor": nested.number("factor")}
    if kind == "linear":
        return found
    # transformers takes dynamic scaling's length from here whatever else is there, and llama3's where nothing else is.
    longest = fields.integer("max_position_embeddings", 2048)
    if kind == "dynamic":
        return found | {"rope_original": longest}
    inner = nested.integer("original_max_position_embeddings", longest)
    original = fields.integer("original_max_position_embeddings", inner)
    return found | {
        "rope_original": original,
        "rope_low": nested.number("low_freq_factor"),
        "rope_high": nested.number("high_freq_factor"),
    }


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_rope`."""
    values: dict[str, Any] = {"rope_type": cfg.rope_scaling, "rope_theta": cfg.rope_theta, "factor": cfg.rope_factor}
    if cfg.rope_scaling == "none":
        return {"rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}}
    if cfg.rope_scaling == "linear":
        return {"rope_parameters": values}
    if cfg.rope_scaling == "dynamic":
        return {"rope_parameters": values, "max_position_embeddings": cfg.rope_original}
    values |= {"low_freq_factor": cfg.rope_low, "high_freq_factor": cfg.rope_high, "original_max_position_embeddings": cfg.rope_original}
    return {"rope_parameters": values, "max_position_embeddings": round(cfg.rope_original * cfg.rope_factor)}


def _chosen(fields: Fields) -> tuple[str, Fields]:
    """The object that counts and its key."""
    for key in ("rope_scaling", "rope_parameters"):
        values = fields.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise CheckpointError(f"{fields.label}: {key!r} is {clip(values)}; expected an object")
        if values:
            return key, Fields(f"{fields.label}: {key}", values)
    return "rope_parameters", Fields(fields.label, {})


def read_gguf_scaling(fields: Fields, prefix: str) -> dict[str, Any]:
    """The scaling in the metadata of a GGUF file, as llama.cpp reads it: linear where no type is given, by 1 where no factor is.

    Args:
        fields: the metadata.
        prefix: what the keys of the architecture begin with, such as `llama.rope.`.

    Raises:
        CheckpointError: a value is of the wrong type, or asks for something that wm-graph does not have.
    """
    kind = fields.text(f"{prefix}scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise fields.unsupported(f"{prefix}scaling.type", "'none' or 'linear'")
    factor = fields.number(f"{prefix}scaling.factor", fields.number(f"{prefix}scale_linear", 0.0))
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    # GGUF holds float32; see `norm_eps`.
    return {"rope_scaling": "linear", "rope_factor": float(str(np.float32(factor)))}
