"""Mamba2, Jamba and Bamba from Hugging Face folders, judged by transformers on the CPU."""

import pytest
import torch

from hybrid_sources import make_bamba, make_jamba, make_mamba2
from import_sources import convert, make_llama
from wm_graph import forward, load_checkpoint, zero_state

LIMIT = 1e-4  # max abs on float32 logits of scale about 1
PROMPT, STEPS = 37, 8  # 37 is no multiple of a chunk
MODELS = {
    "mamba2-tied-groups": (make_mamba2, {"tie_word_embeddings": True}),
    "mamba2-one-group-no-conv-bias": (make_mamba2, {"n_groups": 1, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba2-wide-biases": (make_mamba2, {"expand": 3, "num_heads": 6, "head_dim": 16, "n_groups": 3, "use_bias": True}),
    "jamba-untied": (make_jamba, {}),
    "jamba-tied-biases": (make_jamba, {"tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_dt_rank": 5, "mamba_expand": 3}),
    "jamba-dense": (make_jamba, {"num_experts": 1, "attn_layer_period": 4, "attn_layer_offset": 0, "mamba_conv_bias": False}),
    "jamba-other-periods": (make_jamba, {"expert_layer_period": 3, "expert_layer_offset": 0, "num_experts_per_tok": 3, "mamba_d_conv": 2}),
    "bamba-untied": (make_bamba, {}),
    "bamba-tied-biases": (make_bamba, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True}),
    "bamba-no-attention": (make_bamba, {"attn_layer_indices": None, "mamba_n_groups": 4, "mamba_conv_bias": False}),
    "bamba-whole-rotary": (make_bamba, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
    "llama-biases": (make_llama, {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(params=MODELS)
def model(request):
    make, options = MODELS[request.param]
    return make(**options)


def tokens_of(model):
    return torch.randint(0, model.config.vocab_size, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def logits_of_transformers(model, tokens, pieces):
    """Prefill and cached steps; at once where transformers cannot cache: Bamba without attention."""
    if getattr(model.config, "attn_layer_indices", True) is None:
        return model(tokens, use_cache=False).logits
    is_mamba2 = model.config.model_type == "mamba2"
    name = "cache_params" if is_mamba2 else "past_key_values"
    # Bamba counts every call's positions from 0 unless they are given.
    positions = [{} if is_mamba2 else {"position_ids": piece} for piece in torch.arange(tokens.shape[1]).unsqueeze(0).split(pieces, 1)]
    parts, cache = [], {}
    for piece, options in zip(tokens.split(pieces, 1), positions, strict=True):
        out = model(piece, use_cache=True, **cache, **options)
        parts.append(out.logits)
        cache = {name: getattr(out, name)}
    return torch.cat(parts, 1)


def logits_of_ours(cfg, params, tokens, pieces):
    parts, state = [], zero_state(cfg, tokens.shape[0], tokens.shape[1])
    for piece in tokens.split(pieces, 1):
        logits, state = forward(cfg, params, piece, state)
        parts.append(logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def assert_same_logits(cfg, params, model):
    tokens, pieces = tokens_of(model), [PROMPT, *[1] * STEPS]
    expected = logits_of_transformers(model, tokens, pieces)
    assert expected.std() > 0.3  # a limit on nothing would always hold
    found = logits_of_ours(cfg, params, tokens, pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)


def test_imported_model_gives_the_logits_of_transformers_in_prefill_and_cached_steps(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made")
    assert_same_logits(*load_checkpoint(tmp_path / "made"), model)
