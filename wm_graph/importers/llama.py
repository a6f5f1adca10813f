"""Llama: tensor names of Hugging Face folders and of GGUF files, and their configurations."""

from typing import Any

import numpy as np

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError, ConfigError
from wm_graph.importers.fields import Fields, clip

HUGGING_FACE_NAMES = {
    "embedding": ("model.embed_tokens.weight",),
    "layers.#.mixer_norm": ("model.layers.#.input_layernorm.weight",),
    "layers.#.mixer.qkv": tuple(f"model.layers.#.self_attn.{part}_proj.weight" for part in "qkv"),
    "layers.#.mixer.out": ("model.layers.#.self_attn.o_proj.weight",),
    "layers.#.feed_forward_norm": ("model.layers.#.post_attention_layernorm.weight",),
    "layers.#.feed_forward.gate_up": ("model.layers.#.mlp.gate_proj.weight", "model.layers.#.mlp.up_proj.weight"),
    "layers.#.feed_forward.down": ("model.layers.#.mlp.down_proj.weight",),
    "norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}

GGUF_NAMES = {
    "embedding": ("token_embd.weight",),
    "layers.#.mixer_norm": ("blk.#.attn_norm.weight",),
    "layers.#.mixer.qkv": tuple(f"blk.#.attn_{part}.weight" for part in "qkv"),
    "layers.#.mixer.out": ("blk.#.attn_output.weight",),
    "layers.#.feed_forward_norm": ("blk.#.ffn_norm.weight",),
    "layers.#.feed_forward.gate_up": ("blk.#.ffn_gate.weight", "blk.#.ffn_up.weight"),
    "layers.#.feed_forward.down": ("blk.#.ffn_down.weight",),
    "norm": ("output_norm.weight",),
    "head": ("output.weight",),
}

# What may stand under "llama." in a GGUF file: read below, or without effect on the numbers. Any other key could change the model.
_GGUF_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}


def hugging_face_config(fields: Fields, name: str, mixer: str = "attention", **extra: Any) -> ModelConfig:
    """The configuration in a Hugging Face config.json of Llama; Doge adds its own fields through `mixer` and `extra`.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for something that wm-graph does not have.
    """
    fields.require("hidden_act", "silu")
    fields.require("attention_bias", False)
    fields.require("mlp_bias", False)
    fields.require("quantization_config", None)
    heads = fields.integer("num_attention_heads")
    width = fields.integer("hidden_size")
    return build_config(
        fields.label,
        name=name,
        vocab_size=fields.integer("vocab_size"),
        d_model=width,
        d_ff=fields.integer("intermediate_size"),
        layers=((mixer, "mlp"),) * fields.integer("num_hidden_layers"),
        n_head=heads,
        n_kv_head=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", width // max(heads, 1)),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope_theta=_hugging_face_theta(fields),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        **extra,
    )


def _hugging_face_theta(fields: Fields) -> float:
    """Base of the rotary frequencies, from `rope_theta` or, since transformers 5, from `rope_parameters`."""
    theta = fields.number("rope_theta", 10000.0)
    fields.require("partial_rotary_factor", 1.0)
    for key in ("rope_scaling", "rope_parameters"):
        values = fields.values.get(key)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise CheckpointError(f"{fields.label}: {key!r} is {clip(values)}; expected an object")
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in ("default", "none"):
            raise fields.unsupported(key, "no scaling (null, or the type 'default')")
        nested = Fields(f"{fields.label}: {key}", values)
        nested.require("partial_rotary_factor", 1.0)
        theta = nested.number("rope_theta", theta)
    return theta


def gguf_config(fields: Fields, name: str, vocab_size: int, tied: bool) -> ModelConfig:
    """The configuration in the metadata of a GGUF file of the Llama architecture.

    Args:
        fields: the metadata.
        name: name of the result.
        vocab_size: rows of the embedding; an explicit `llama.vocab_size` must equal it.
        tied: the file has no head of its own.

    Raises:
        CheckpointError: a key is missing, of the wrong type, or asks for something that wm-graph does not have.
    """
    _check_gguf_keys(fields, vocab_size)
    heads = fields.integer("llama.attention.head_count")
    width = fields.integer("llama.embedding_length")
    head_dim = fields.integer("llama.attention.key_length", width // max(heads, 1))
    fields.require("llama.attention.value_length", head_dim)
    fields.require("llama.rope.dimension_count", head_dim)
    # GGUF holds float32: the shortest decimal that reads back as it is what the model was trained with, 1e-05 and not 9.99999974e-06.
    epsilon = float(str(np.float32(fields.number("llama.attention.layer_norm_rms_epsilon"))))
    return build_config(
        fields.label,
        name=name,
        vocab_size=vocab_size,
        d_model=width,
        d_ff=fields.integer("llama.feed_forward_length"),
        layers=(("attention", "mlp"),) * fields.integer("llama.block_count"),
        n_head=heads,
        n_kv_head=fields.integer("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        tie_embeddings=tied,
        rope_theta=fields.number("llama.rope.freq_base", 10000.0),
        norm_eps=epsilon,
    )


def _check_gguf_keys(fields: Fields, vocab_size: int) -> None:
    unknown = [key for key in fields.values if key.startswith("llama.") and key.removeprefix("llama.") not in _GGUF_KEYS]
    fields.require("llama.rope.scaling.type", "none")
    fields.require("llama.expert_count", 0)
    fields.require("llama.expert_used_count", 0)
    fields.require("llama.vocab_size", vocab_size)
    if unknown:
        raise fields.unsupported(unknown[0], "no such key")


def build_config(label: str, **values: Any) -> ModelConfig:
    """A ModelConfig whose complaints name the imported file.

    Raises:
        CheckpointError: the values do not make a model.
    """
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{label}: {error}") from error
