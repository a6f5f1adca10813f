"""Doge as in transformers (dense): Llama's tensors and, per layer, dynamic mask, q/k norms and learned residuals."""

from wm_graph.config import ModelConfig
from wm_graph.importers import llama
from wm_graph.importers.fields import Fields

HUGGING_FACE_NAMES = llama.HUGGING_FACE_NAMES | {
    "layers.#.mixer.dt": ("model.layers.#.self_attn.dt_proj.weight",),
    "layers.#.mixer.A": ("model.layers.#.self_attn.A",),
    "layers.#.mixer.q_norm": ("model.layers.#.self_attn.q_norm.weight",),
    "layers.#.mixer.k_norm": ("model.layers.#.self_attn.k_norm.weight",),
    "layers.#.mixer_residual": ("model.layers.#.input_residual",),
    "layers.#.feed_forward_residual": ("model.layers.#.post_attention_residual",),
}


def hugging_face_config(fields: Fields, name: str) -> ModelConfig:
    """The configuration in a Hugging Face config.json of Doge.

    Raises:
        CheckpointError: a field is missing, of the wrong type, or asks for something that wm-graph does not have, such as `is_moe`.
    """
    fields.require("is_moe", False)
    fields.require("sliding_window", None)
    return llama.hugging_face_config(
        fields,
        name,
        mixer="dynamic_mask_attention",
        keep_window=fields.integer("keep_window_size", 2048),
        qk_norm=True,
        learned_residual=True,
    )
