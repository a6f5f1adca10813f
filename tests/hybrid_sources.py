"""Small random transformers models of Mamba2, Jamba and Bamba for the import tests."""

import torch
from transformers import BambaConfig, BambaForCausalLM, JambaConfig, JambaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from import_sources import randomised

_MAMBA2 = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2}
# Chunks of 16, so that no length of the tests is a multiple; embeddings large enough for logits of scale about 1.
_MAMBA2 |= {"chunk_size": 16, "pad_token_id": 0, "initializer_range": 0.3}


def make_mamba2(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return randomised(Mamba2ForCausalLM(Mamba2Config(**(_MAMBA2 | options)))).to(dtype)


_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, **_ATTENTION}


def make_jamba(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    sizes = {"num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6, "use_mamba_kernels": False}
    config = JambaConfig(**(_SIZES | sizes | options))
    config._experts_implementation = "eager"  # the default of transformers 5.17 wants rows of a multiple of 16 bytes
    return randomised(JambaForCausalLM(config)).to(dtype)


def make_bamba(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    sizes = {"attn_layer_indices": [1, 4], "mamba_n_heads": 8, "mamba_d_state": 12, "mamba_n_groups": 2, "mamba_chunk_size": 16}
    return randomised(BambaForCausalLM(BambaConfig(**(_SIZES | sizes | options)))).to(dtype)
