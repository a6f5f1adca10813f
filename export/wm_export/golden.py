"""Golden data: a few tokens and the float64 oracle's logits at every position, for any runtime to be checked against."""

import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.oracle import oracle_forward
from wm_graph.params import Params

ROWS, PREFILL, DECODE = 2, 8, 4


def golden_data(cfg: ModelConfig, params: Params) -> dict[str, Tensor]:
    """`tokens` [B, T] int64, `prefill` (tokens to give at once, the rest one by one), `logits` [B, T, V] float64.

    The tokens of a row all differ, as far as the vocabulary allows, so that no two scores tie by accident.
    """
    generator = torch.Generator().manual_seed(20240724)
    count = PREFILL + DECODE
    rows = [torch.randperm(cfg.vocab_size, generator=generator)[:count] for _ in range(ROWS)]
    tokens_BT = torch.stack([row.repeat(-(-count // len(row)))[:count] for row in rows])
    logits_BTV, _ = oracle_forward(cfg, params, tokens_BT)
    return {"tokens": tokens_BT, "prefill": torch.tensor(PREFILL), "logits": logits_BTV}
