"""Llama: tensor names of Hugging Face folders and of GGUF files, and their configurations."""

import numpy as np

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.importers.family import Family, Same, Values, build_config
from wm_graph.importers.fields import Fields
from wm_graph.importers.rope import read_gguf_scaling, read_rope, write_rope

# Shared by the architectures that descend from Llama.
ATTENTION_TENSORS = {
    f"layers.#.mixer.{name}{ours}": tuple(f"model.layers.#.self_attn.{part}_proj.{theirs}" for part in parts)
    for name, parts in (("qkv", "qkv"), ("out", "o"))
    for ours, theirs in (("", "weight"), ("_bias", "bias"))
}
ATTENTION_SIZES = (
    Same("num_attention_heads", "n_head"),
    Same("num_key_value_heads", "n_kv_head", lambda values: values["n_head"]),
    Same("head_dim", "head_dim", lambda values: values["d_model"] // max(values["n_head"], 1)),
)


def gated_mlp_tensors(module: str) -> dict[str, tuple[str, ...]]:
    """The tensors of a gated MLP called `module`."""
    return {
        f"layers.#.feed_forward.{name}{ours}": tuple(f"model.layers.#.{module}.{part}_proj.{theirs}" for part in parts)
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",)))
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
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
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}


def read_layers(fields: Fields, mixer: str) -> Values:
    """The fields about layers and positions of a model whose layers are all alike.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for something that wm-graph does not have.
    """
    layers = ((mixer, "mlp"),) * fields.integer("num_hidden_layers")
    return {"layers": layers, **read_rope(fields)}


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
        **read_gguf_scaling(fields, "llama.rope."),
    )


def _check_gguf_keys(fields: Fields, vocab_size: int) -> None:
    unknown = [key for key in fields.values if key.startswith("llama.") and key.removeprefix("llama.") not in _GGUF_KEYS]
    fields.require("llama.expert_count", 0)
    fields.require("llama.expert_used_count", 0)
    fields.require("llama.vocab_size", vocab_size)
    if unknown:
        raise fields.unsupported(unknown[0], "no such key")


def _write(cfg: ModelConfig) -> Values:
    if cfg.d_model % cfg.n_head:  # transformers refuses it, though head_dim stands in config.json
        raise CheckpointError(f"d_model {cfg.d_model} is not a multiple of n_head {cfg.n_head}")
    return write_rope(cfg)


HUGGING_FACE = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    mixers=("attention",),
    feed_forwards=("mlp",),
    tensors={
        "embedding": ("model.embed_tokens.weight",),
        "layers.#.mixer_norm": ("model.layers.#.input_layernorm.weight",),
        **ATTENTION_TENSORS,
        "layers.#.feed_forward_norm": ("model.layers.#.post_attention_layernorm.weight",),
        **gated_mlp_tensors("mlp"),
        "norm": ("model.norm.weight",),
        "head": ("lm_head.weight",),
    },
    same=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "d_ff"),
        *ATTENTION_SIZES,
        Same("max_position_embeddings", "rope_original", 2048),
        Same("attention_bias", "attention_bias", False),
        Same("mlp_bias", "mlp_bias", False),
        Same("rms_norm_eps", "norm_eps", 1e-6),
        Same("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={"hidden_act": "silu"},
    read=lambda fields, values: read_layers(fields, "attention"),
    write=_write,
    harmless="is_llama_config",  # SmolLM2's, from its training; transformers does not know it
)
