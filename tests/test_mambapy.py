"""Jamba as mambapy has it: an oracle that shares no code with transformers."""

import pytest
import torch

from wm_graph import ModelConfig, forward, init_params, zero_state
from wm_graph.exporters.architecture import find_architecture
from wm_graph.importers.family import family_layout
from wm_graph.importers.layout import take_apart
from wm_graph.params import map_tensors, params_to_flat

jamba = pytest.importorskip("mambapy.jamba", reason="mambapy is not installed; the test extra has it")

LIMIT = 1e-4  # max abs on float32 logits of scale about 1
SIZES = {"name": "jamba", "vocab_size": 96, "d_model": 32, "d_ff": 48, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "mamba1_state": 6}
SIZES |= {"attention_rope": False, "mamba1_norm": True, "mamba1_width": 64, "dt_rank": 3, "norm_eps": 1e-5}
MIXERS = ("mamba1", "attention", "mamba1", "mamba1", "attention")
MODELS = {
    "experts": ModelConfig(**SIZES, layers=tuple((m, "moe" if i % 2 else "mlp") for i, m in enumerate(MIXERS)), n_expert=4, n_pick=2),
    "one pick, untied": ModelConfig(
        **SIZES, layers=tuple((m, "mlp" if i % 2 else "moe") for i, m in enumerate(MIXERS)), n_expert=3, n_pick=1, tie_embeddings=False
    ),
    "dense, biases": ModelConfig(**(SIZES | {"mamba1_width": 96}), layers=tuple((m, "mlp") for m in MIXERS), mamba_bias=True, conv_size=3),
}


def mambapy_model(cfg, params):
    """mambapy's model with our parameters, by the names that the Hugging Face folder has."""
    family, values = find_architecture(cfg)
    periods = {key: values[key] for key in ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset")}
    experts = {key: values[key] for key in ("num_experts", "num_experts_per_tok")}
    sizes = {"d_model": cfg.d_model, "n_layers": len(cfg.layers), "mlp_size": cfg.d_ff, "vocab_size": cfg.vocab_size}
    sizes |= {"d_state": cfg.mamba1_state, "d_conv": cfg.conv_size, "dt_rank": cfg.dt_rank, "expand_factor": values["mamba_expand"]}
    sizes |= {"num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.n_kv_head, "bias": cfg.mamba_bias, "conv_bias": cfg.conv_bias}
    config = jamba.JambaLMConfig(**sizes, **periods, **experts, rms_norm_eps=cfg.norm_eps, tie_lm_weights=cfg.tie_embeddings)
    stored = take_apart(params_to_flat(cfg, params), family_layout(family, cfg))
    names = {"model.embed_tokens": "embedding", "model.final_layernorm": "final_layernorm", "model.": "jamba.", "feed_forward": "moe"}
    names |= {"pre_ff_layernorm": "pre_moe_layernorm", "b_layernorm": "B_layernorm", "c_layernorm": "C_layernorm"}
    tensors = {}
    for name, tensor in stored.items():
        if ".feed_forward." in name and ".experts." not in name and ".router." not in name:
            name = name.replace("feed_forward", "feed_forward.experts.0")  # one expert and no router
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    if cfg.tie_embeddings:
        tensors["lm_head.weight"] = tensors["embedding.weight"]
    model = jamba.JambaLM(config)
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_jamba_of_mambapy_gives_the_same_logits_at_once_and_step_by_step(name):
    cfg = MODELS[name]
    draw = torch.Generator().manual_seed(0)
    params = map_tensors(init_params(cfg), lambda _, tensor: tensor + 0.15 * torch.randn(tensor.shape, generator=draw))
    model = mambapy_model(cfg, params)
    tokens = torch.randint(0, cfg.vocab_size, (2, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert expected.std() > 0.3  # a limit on nothing would always hold
        parts, state = [], zero_state(cfg, 2, 29)
        for piece in tokens.split([21, *[1] * 8], 1):
            logits, state = forward(cfg, params, piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=LIMIT)
