"""Mamba-2 as in transformers: a mamba2 mixer in every layer and no feed-forward."""

from wm_graph.config import ModelConfig
from wm_graph.importers.family import Family, Same, Values, read_step_limits, write_step_limits
from wm_graph.importers.fields import Fields

# One mixer's parameters -> its tensors, below the layer; Bamba has the same.
MIXER_TENSORS = {
    "in_proj": "in_proj.weight",
    "in_proj_bias": "in_proj.bias",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "A_log": "A_log",
    "D": "D",
    "norm": "norm.weight",
    "out_proj": "out_proj.weight",
    "out_proj_bias": "out_proj.bias",
}


def check_width(fields: Fields, values: Values, key: str) -> None:
    """Refuse an expansion, under `key`, that is not the width of all heads.

    Raises:
        CheckpointError: it is not.
    """
    inner, heads = values["d_model"] * fields.integer(key, 2), values["ssd_head"] * values["ssd_head_dim"]
    if inner != heads:
        raise fields.unsupported(key, f"the width of all heads, {heads}, over hidden_size {values['d_model']}")


def _read(fields: Fields, values: Values) -> Values:
    check_width(fields, values, "expand")
    layers = (("mamba2", "none"),) * fields.integer("num_hidden_layers")
    # No layer attends or has a feed-forward: their sizes are placeholders.
    sizes = {"layers": layers, "d_ff": 1, "n_head": 1, "n_kv_head": 1, "head_dim": 2}
    return {**sizes, "ssd_rope": False, **read_step_limits(fields)}


def _write(cfg: ModelConfig) -> Values:
    return {"expand": cfg.ssd_head * cfg.ssd_head_dim // cfg.d_model, **write_step_limits(cfg)}


HUGGING_FACE = Family(
    kind="mamba2",
    architecture="Mamba2ForCausalLM",
    mixers=("mamba2",),
    feed_forwards=("none",),
    tensors={
        "embedding": ("backbone.embeddings.weight",),
        "layers.#.mixer_norm": ("backbone.layers.#.norm.weight",),
        **{f"layers.#.mixer.{name}": (f"backbone.layers.#.mixer.{tensor}",) for name, tensor in MIXER_TENSORS.items()},
        "norm": ("backbone.norm_f.weight",),
        "head": ("lm_head.weight",),
    },
    same=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("num_heads", "ssd_head"),
        Same("head_dim", "ssd_head_dim"),
        Same("state_size", "ssd_state"),
        Same("n_groups", "ssd_group"),
        Same("conv_kernel", "conv_size", 4),
        Same("use_conv_bias", "conv_bias", True),
        Same("use_bias", "mamba_bias", False),
        Same("layer_norm_epsilon", "norm_eps", 1e-5),
        Same("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={"hidden_act": "silu"},
    read=_read,
    write=_write,
    # First values of dt and of the output; the dtype of the residual sum; and what Mistral's file says besides, which transformers does
    # not read: its norm is RMS, gated first, and as wide as all heads. There are no positions.
    harmless="""time_step_floor time_step_init_scheme time_step_max time_step_min time_step_rank time_step_scale rescale_prenorm_residual
        residual_in_fp32 rms_norm norm_before_gate intermediate_size max_position_embeddings pad_vocab_size_multiple""",
)
