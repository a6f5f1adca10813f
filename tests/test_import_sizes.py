"""Random models of odd sizes against transformers on the CPU: every architecture, prefill and cached steps.

Widths that are no powers of two, three and five heads, groups of three and more, vocabularies of a prime number of tokens: a stride, a
padding or a group taken wrongly shows here and not where all sizes are multiples of eight. The flags differ as well.
"""

import pytest
import torch

from hybrid_sources import make_bamba, make_jamba, make_mamba2
from import_sources import convert, make_doge, make_llama
from test_import_hybrid import LIMIT, STEPS, logits_of_ours, logits_of_transformers
from wm_graph import load_checkpoint

PROMPTS = (2, 71, 139)  # shorter than a convolution; no multiple of a chunk, ours of 64 or those below; more than two chunks

LLAMA3 = {"rope_type": "llama3", "rope_theta": 700.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
LLAMA3 |= {"original_max_position_embeddings": 48}
LINEAR = {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}
PARTLY = {"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.4}


def _attends(hidden, heads, kv_heads, head_dim=None):
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim or hidden // heads}


MODELS = {
    "llama 3 heads on 1": (
        make_llama,
        _attends(30, 3, 1) | {"vocab_size": 97, "intermediate_size": 37, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama 9 wide heads on 3": (
        make_llama,
        _attends(63, 9, 3, 12)
        | {"vocab_size": 131, "intermediate_size": 83, "mlp_bias": True, "rope_parameters": LLAMA3, "initializer_range": 0.1},
    ),
    "llama 5 narrow heads": (
        make_llama,
        _attends(45, 5, 5, 6) | {"vocab_size": 113, "intermediate_size": 1, "num_hidden_layers": 3, "rope_parameters": LINEAR},
    ),
    "mamba2 3 heads, 1 group": (
        make_mamba2,
        {"vocab_size": 97, "hidden_size": 18, "num_heads": 3, "head_dim": 12, "n_groups": 1, "state_size": 5, "conv_kernel": 3}
        | {"chunk_size": 10, "tie_word_embeddings": True},
    ),
    "mamba2 6 heads, 2 groups of 3": (
        make_mamba2,
        {"vocab_size": 131, "hidden_size": 20, "num_heads": 6, "head_dim": 10, "expand": 3, "n_groups": 2, "state_size": 7}
        | {"conv_kernel": 5, "chunk_size": 33, "use_bias": True},
    ),
    "mamba2 5 heads, 5 groups": (
        make_mamba2,
        {"vocab_size": 113, "hidden_size": 35, "num_heads": 5, "head_dim": 7, "expand": 1, "n_groups": 5, "state_size": 1}
        | {"conv_kernel": 2, "chunk_size": 64, "use_conv_bias": False, "num_hidden_layers": 1},
    ),
    "jamba 3 heads on 1, 3 experts": (
        make_jamba,
        _attends(30, 3, 1)
        | {"vocab_size": 97, "intermediate_size": 37, "num_experts": 3, "num_experts_per_tok": 1, "mamba_d_state": 5}
        | {"mamba_d_conv": 3, "mamba_dt_rank": 1, "tie_word_embeddings": True},
    ),
    "jamba 6 heads on 2, 5 experts": (
        make_jamba,
        _attends(42, 6, 2)
        | {"vocab_size": 131, "intermediate_size": 29, "num_experts": 5, "num_experts_per_tok": 4, "mamba_d_state": 3}
        | {"mamba_d_conv": 5, "mamba_dt_rank": 7, "mamba_expand": 3, "mamba_proj_bias": True, "expert_layer_period": 3},
    ),
    "jamba 5 heads, dense": (
        make_jamba,
        _attends(35, 5, 5)
        | {"vocab_size": 113, "intermediate_size": 53, "num_experts": 1, "mamba_d_state": 1, "mamba_expand": 1}
        | {"mamba_d_conv": 2, "mamba_conv_bias": False, "attn_layer_period": 2, "num_hidden_layers": 3},
    ),
    "doge 3 heads on 1": (
        make_doge,
        _attends(30, 3, 1) | {"vocab_size": 151, "intermediate_size": 37, "keep_window_size": 7, "tie_word_embeddings": True},
    ),
    "doge 9 wide heads on 3": (
        make_doge,
        _attends(63, 9, 3, 12)
        | {"vocab_size": 163, "intermediate_size": 83, "keep_window_size": 33, "mlp_bias": True}
        | {"rope_parameters": LINEAR},
    ),
    "doge 5 narrow heads": (
        make_doge,
        _attends(45, 5, 5, 6) | {"vocab_size": 197, "intermediate_size": 11, "keep_window_size": 1, "num_hidden_layers": 3},
    ),
    "bamba 3 heads on 1": (
        make_bamba,
        _attends(36, 3, 1)
        | {"vocab_size": 97, "intermediate_size": 37, "mamba_n_heads": 6, "mamba_d_state": 5, "mamba_n_groups": 2}
        | {"mamba_d_conv": 3, "mamba_chunk_size": 10, "tie_word_embeddings": True},
    ),
    "bamba 6 heads on 2, 4 of 10 features rotated": (
        make_bamba,
        _attends(60, 6, 2)
        | {"vocab_size": 131, "intermediate_size": 29, "mamba_n_heads": 9, "mamba_d_state": 7, "mamba_n_groups": 3}
        | {"mamba_expand": 3, "mamba_chunk_size": 33, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True}
        | {"rope_parameters": PARTLY},
    ),
    "bamba 5 wide heads": (
        make_bamba,
        _attends(35, 5, 5, 12)
        | {"vocab_size": 113, "intermediate_size": 53, "mamba_n_heads": 5, "mamba_d_state": 1, "mamba_n_groups": 1}
        | {"mamba_expand": 1, "mamba_d_conv": 5, "mamba_conv_bias": False, "mamba_chunk_size": 64, "attn_layer_indices": [0, 3]},
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def models(request, tmp_path_factory):
    """(transformers' model, our configuration and parameters)."""
    make, options = MODELS[request.param]
    model, folder = make(**options), tmp_path_factory.mktemp("sizes")
    model.save_pretrained(folder / "source")
    convert(folder / "source", folder / "made")
    return model, load_checkpoint(folder / "made")


def distinct_tokens(vocab_size, length):
    """No token twice in a row, where there are as many: scores that tie at the edge of Doge's window have no order in transformers."""
    rows = [torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    return torch.stack([row.repeat(2)[:length] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prefill_and_cached_steps_are_those_of_transformers_at_odd_sizes(models, prompt):
    model, (cfg, params) = models
    tokens, pieces = distinct_tokens(cfg.vocab_size, prompt + STEPS), [prompt, *[1] * STEPS]
    if cfg.layers[0][0] == "dynamic_mask_attention":
        assert cfg.vocab_size >= prompt + STEPS
    expected = logits_of_transformers(model, tokens, pieces)
    assert expected.std() > 0.3  # a limit on nothing would always hold
    found = logits_of_ours(cfg, params, tokens, pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)
