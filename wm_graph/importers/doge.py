"""Doge as in transformers (dense): Llama's tensors and, per layer, dynamic mask, q/k norms and learned residuals."""

from wm_graph.importers import llama
from wm_graph.importers.family import Family, Same, Values
from wm_graph.importers.fields import Fields
from wm_graph.importers.rope import write_rope


def _read(fields: Fields, values: Values) -> Values:
    return {**llama.read_layers(fields, "dynamic_mask_attention"), "qk_norm": True, "learned_residual": True}


HUGGING_FACE = Family(
    kind="doge",
    architecture="DogeForCausalLM",
    mixers=("dynamic_mask_attention",),
    feed_forwards=("mlp",),
    tensors={
        **llama.HUGGING_FACE.tensors,
        "layers.#.mixer.dt": ("model.layers.#.self_attn.dt_proj.weight",),
        "layers.#.mixer.A": ("model.layers.#.self_attn.A",),
        "layers.#.mixer.q_norm": ("model.layers.#.self_attn.q_norm.weight",),
        "layers.#.mixer.k_norm": ("model.layers.#.self_attn.k_norm.weight",),
        "layers.#.mixer_residual": ("model.layers.#.input_residual",),
        "layers.#.feed_forward_residual": ("model.layers.#.post_attention_residual",),
    },
    same=(
        *(same for same in llama.HUGGING_FACE.same if same.name != "attention_bias"),
        Same("keep_window_size", "keep_window", 2048),
    ),
    # A bias of attention would be one of dt_proj too, which wm-graph does not have.
    fixed={"hidden_act": "silu", "is_moe": False, "sliding_window": None, "attention_bias": False},
    read=_read,
    write=write_rope,
    # About the experts that is_moe switches on, in the names of transformers and in those of the first Doge models.
    harmless="""num_experts num_experts_per_tok norm_topk_prob num_cdmoe_experts num_cdmoe_experts_per_head num_cdmoe_heads
        expert_retrieval_size""",
)
