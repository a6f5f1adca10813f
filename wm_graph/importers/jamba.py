"""Jamba as in transformers: mamba1 mixers with norms of dt, B and C, attention without RoPE, a mixture of experts every so many layers."""

from wm_graph.config import ModelConfig
from wm_graph.importers.family import Family, Same, Values
from wm_graph.importers.fields import Fields
from wm_graph.importers.llama import ATTENTION_SIZES, ATTENTION_TENSORS, gated_mlp_tensors

_MIXER_TENSORS = {
    "in_proj": "in_proj.weight",
    "in_proj_bias": "in_proj.bias",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj": "x_proj.weight",
    "dt_proj": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "dt_norm": "dt_layernorm.weight",
    "B_norm": "b_layernorm.weight",
    "C_norm": "c_layernorm.weight",
    "out_proj": "out_proj.weight",
    "out_proj_bias": "out_proj.bias",
}
_EXPERTS = "model.layers.#.feed_forward.experts"


def _read(fields: Fields, values: Values) -> Values:
    count, experts = fields.integer("num_hidden_layers"), fields.integer("num_experts")
    attends, routes = _read_period(fields, "attn_layer"), _read_period(fields, "expert_layer")
    layers = tuple(
        ("attention" if index in attends else "mamba1", "moe" if experts > 1 and index in routes else "mlp") for index in range(count)
    )
    rank = -(-values["d_model"] // 16) if fields.get("mamba_dt_rank") == "auto" else fields.integer("mamba_dt_rank")
    return {
        "layers": layers,
        "attention_rope": False,
        "mamba1_width": values["d_model"] * fields.integer("mamba_expand"),
        "mamba1_norm": True,
        "dt_rank": rank,
        "n_expert": experts if experts > 1 else 0,
        "n_pick": fields.integer("num_experts_per_tok") if experts > 1 else 0,
    }


def _read_period(fields: Fields, key: str) -> range:
    """The layers that `key`_period and `key`_offset name."""
    period, offset = fields.integer(f"{key}_period"), fields.integer(f"{key}_offset")
    if period < 1:
        raise fields.unsupported(f"{key}_period", "at least 1")
    if not 0 <= offset < period:
        raise fields.unsupported(f"{key}_offset", f"0 to {period - 1}, below {key}_period")
    return range(offset, fields.integer("num_hidden_layers"), period)


def _write(cfg: ModelConfig) -> Values:
    attends, routes = ([index for index, pair in enumerate(cfg.layers) if kind in pair] for kind in ("attention", "moe"))
    return {
        **_write_period("attn_layer", attends, len(cfg.layers)),
        **_write_period("expert_layer", routes, len(cfg.layers)),
        "mamba_expand": cfg.mamba1_width // cfg.d_model or 1,
        "mamba_dt_rank": cfg.dt_rank,
        "num_experts": cfg.n_expert if routes else 1,
        "num_experts_per_tok": cfg.n_pick if routes else 1,
        "use_mamba_kernels": False,
    }


def _write_period(key: str, layers: list[int], count: int) -> Values:
    """The inverse of `_read_period`, for layers at equal distances; the last layer's index is below the count, so is every offset."""
    if not layers:
        return {f"{key}_period": count + 1, f"{key}_offset": count}
    return {f"{key}_period": layers[1] - layers[0] if len(layers) > 1 else count, f"{key}_offset": layers[0]}


HUGGING_FACE = Family(
    kind="jamba",
    architecture="JambaForCausalLM",
    mixers=("mamba1", "attention"),
    feed_forwards=("mlp", "moe"),
    tensors={
        "embedding": ("model.embed_tokens.weight",),
        "layers.#.mixer_norm": ("model.layers.#.input_layernorm.weight",),
        **{f"layers.#.mixer.{name}": (f"model.layers.#.mamba.{tensor}",) for name, tensor in _MIXER_TENSORS.items()},
        **ATTENTION_TENSORS,
        "layers.#.feed_forward_norm": ("model.layers.#.pre_ff_layernorm.weight",),
        **gated_mlp_tensors("feed_forward"),
        "layers.#.feed_forward.router": ("model.layers.#.feed_forward.router.weight",),
        "layers.#.feed_forward.expert_in": (f"{_EXPERTS}.*.gate_proj.weight", f"{_EXPERTS}.*.up_proj.weight"),
        "layers.#.feed_forward.expert_out": (f"{_EXPERTS}.*.down_proj.weight",),
        "norm": ("model.final_layernorm.weight",),
        "head": ("lm_head.weight",),
    },
    # The names inside transformers 5, whose save_pretrained writes one tensor per expert.
    other={
        "layers.#.feed_forward.expert_in": (f"{_EXPERTS}.gate_up_proj",),
        "layers.#.feed_forward.expert_out": (f"{_EXPERTS}.down_proj",),
    },
    same=(
        Same("vocab_size", "vocab_size"),
        Same("hidden_size", "d_model"),
        Same("intermediate_size", "d_ff"),
        *ATTENTION_SIZES,
        Same("max_position_embeddings", "rope_original", 262144),
        Same("mamba_d_state", "mamba1_state"),
        Same("mamba_d_conv", "conv_size", 4),
        Same("mamba_conv_bias", "conv_bias", True),
        Same("mamba_proj_bias", "mamba_bias", False),
        Same("rms_norm_eps", "norm_eps", 1e-6),
        Same("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={"hidden_act": "silu", "sliding_window": None, "mamba_inner_layernorms": True},
    read=_read,
    write=_write,
    harmless="num_experts_per_tok",  # read where there are experts
)
