"""RoPE in the metadata of others: the base of the rotary frequencies, and their scaling."""

from typing import Any

import numpy as np

from wm_graph.config import ModelConfig
from wm_graph.importers.fields import Fields

_TYPES = "no scaling (null, or the type 'default'), or the type 'linear', 'llama3' or 'dynamic'"


def read_rope(fields: Fields, *, whole: bool = True) -> dict[str, Any]:
    """The fields of ModelConfig about rotary frequencies, from a config.json of Hugging Face.

    They stand under `rope_theta` and `rope_scaling` or, since transformers 5, under `rope_parameters`; `rope_scaling` comes first.

    Args:
        fields: the config.json.
        whole: refuse a share of the head, `partial_rotary_factor`; False where that is read elsewhere.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for something that wm-graph does not have.
    """
    theta = fields.number("rope_theta", 10000.0)
    key, nested = rope_object(fields)
    for place in (fields, nested) if whole else ():
        place.require("partial_rotary_factor", 1.0)
    for place in (fields, nested):
        place.skip(("original_max_position_embeddings",))  # transformers, too, looks at it for llama3 alone
    found: dict[str, Any] = {"rope_theta": nested.number("rope_theta", theta)}
    kind = nested.get("rope_type", nested.get("type", "default"))
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


def rope_object(fields: Fields) -> tuple[str, Fields]:
    """The key and the entries of the object that counts; what is in the other one does not matter.

    Raises:
        CheckpointError: under a key is something else than an object.
    """
    fields.skip(("rope_scaling", "rope_parameters"))
    key = "rope_scaling" if fields.inner("rope_scaling").values else "rope_parameters"
    return key, fields.inner(key)


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
