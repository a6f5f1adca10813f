"""Small random transformers models of Mamba2, Jamba and Bamba for the import tests."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from import_sources import randomised

_MAMBA2 = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 12, "n_groups": 2}
# Chunks of 16, so that no length of the tests is a multiple; embeddings large enough for logits of scale about 1.
_MAMBA2 |= {"chunk_size": 16, "pad_token_id": 0, "initializer_range": 0.3}


def make_mamba2(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return randomised(Mamba2ForCausalLM(Mamba2Config(**(_MAMBA2 | options)))).to(dtype)
