"""Bamba as in transformers: mamba2 mixers, attention with partial RoPE in the layers listed, a gated MLP in every layer."""

import math

from wm_graph.config import ModelConfig
from wm_graph.importers.family import Family, Same, Values, read_step_limits, write_step_limits
from wm_graph.importers.fields import Fields
from wm_graph.importers.llama import ATTENTION_SIZES, ATTENTION_TENSORS, gated_mlp_tensors
from wm_graph.importers.mamba2 import MIXER_TENSORS, check_width
from wm_graph.importers.rope import read_rope, rope_object, write_rope

_FACTOR = "partial_rotary_factor"


def _read(fields: Fields, values: Values) -> Values:
    heads = values["ssd_head"]
    if fields.get("mamba_d_head", "auto") == "auto":
        head_dim = fields.integer("mamba_expand", 2) * values["d_model"] // max(heads, 1)
    else:
        head_dim = fields.integer("mamba_d_head")
    layers = _read_layers(fields)
    if any(mixer == "mamba2" for mixer, _ in layers):
        check_width(fields, {**values, "ssd_head_dim": head_dim}, "mamba_expand")
    return {
        "layers": layers,
        "ssd_head_dim": head_dim,
        "ssd_rope": False,
        **read_step_limits(fields),
        **_read_rope(fields, values["head_dim"]),
    }


def _read_layers(fields: Fields) -> tuple[tuple[str, str], ...]:
    count = fields.integer("num_hidden_layers")
    attends = [] if fields.get("attn_layer_indices") is None else fields.integers("attn_layer_indices")
    if any(not 0 <= index < count for index in attends):
        raise fields.unsupported("attn_layer_indices", f"indices from 0 to {count - 1}")
    return tuple(("attention" if index in attends else "mamba2", "mlp") for index in range(count))


def _read_rope(fields: Fields, head_dim: int) -> Values:
    """As `read_rope`, with the share of a head that is rotated; transformers takes half where the inner object names none."""
    _, nested = rope_object(fields)
    width = int(head_dim * nested.number(_FACTOR, 0.5))
    if not 2 <= width <= head_dim:
        raise nested.unsupported(_FACTOR, f"a share of head_dim {head_dim} that is a pair at least and not more than all")
    fields.require("attn_rotary_emb", width)  # what the files of the first Bamba models say besides
    return {"rotary_dim": width if width < head_dim else 0, **read_rope(fields, whole=False)}


def _write(cfg: ModelConfig) -> Values:
    values = write_rope(cfg)
    width = cfg.rotary_dim or cfg.head_dim
    share = width / cfg.head_dim
    values["rope_parameters"][_FACTOR] = share if int(cfg.head_dim * share) == width else math.nextafter(share, 1.0)
    attends = [index for index, (mixer, _) in enumerate(cfg.layers) if mixer == "attention"]
    heads = {"mamba_expand": cfg.ssd_head * cfg.ssd_head_dim // cfg.d_model, "mamba_d_head": cfg.ssd_head_dim}
    if len(attends) == len(cfg.layers):  # no layer has these heads, yet transformers wants sizes that agree
        heads = {"mamba_expand": 1, "mamba_n_heads": 1, "mamba_d_head": cfg.d_model}
    return {**values, **heads, "attn_layer_indices": attends, **write_step_limits(cfg)}


HUGGING_FACE = Family(
    kind="bamba",
    architecture="BambaForCausalLM",
    mixers=("mamba2", "attention"),
    feed_forwards=("mlp",),
    tensors={
        "embedding": ("model.embed_tokens.weight",),
        "layers.#.mixer_norm": ("model.layers.#.input_layernorm.weight",),
        **{f"layers.#.mixer.{name}": (f"model.layers.#.mamba.{tensor}",) for name, tensor in MIXER_TENSORS.items()},
        **ATTENTION_TENSORS,
        "layers.#.feed_forward_norm": ("model.layers.#.pre_ff_layernorm.weight",),
        **gated_mlp_tensors("feed_forward"),
        "norm": ("model.final_layernorm.weight",),
        "head": ("lm_head.weight",),
    },
    same=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "d_ff"),
        *ATTENTION_SIZES,
        Same("max_position_embeddings", "rope_original", 262144),
        Same("attention_bias", "attention_bias", False),
        Same("mlp_bias", "mlp_bias", False),
        Same("mamba_n_heads", "ssd_head"),
        Same("mamba_d_state", "ssd_state"),
        Same("mamba_n_groups", "ssd_group", 1),
        Same("mamba_d_conv", "conv_size", 4),
        Same("mamba_conv_bias", "conv_bias", True),
        Same("mamba_proj_bias", "mamba_bias", False),
        Same("rms_norm_eps", "norm_eps", 1e-5),
        Same("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={"hidden_act": "silu"},
    read=_read,
    write=_write,
    # transformers writes 0.5 as the factor whatever the inner object says, and reads that alone. The expansion is of mamba2 layers, and
    # read where there are any; a rank of dt would be of mamba1 layers.
    harmless=f"{_FACTOR} mamba_expand mamba_dt_rank",
)
