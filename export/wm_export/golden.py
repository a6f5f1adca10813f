"""Golden data: a few tokens and the float64 oracle's logits at every position, for any runtime to be checked against."""

import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.oracle import oracle_forward
from wm_graph.params import Params
from wm_graph.taps import Taps
from wm_graph.tolerances import UNIT_ROUNDOFF

ROWS, PREFILL, DECODE = 2, 8, 4


def golden_data(cfg: ModelConfig, params: Params) -> dict[str, Tensor]:
    """`tokens` [B, T] int64, `prefill` (so many at once, then one by one), `logits` [B, T, V] float64, `moved_max_abs` float64.

    The last is how far the worst logit moves when each weight moves by up to u of the parameters' dtype and the choices of experts stay.

    The tokens of a row all differ, as far as the vocabulary allows, so that no two scores tie by accident. A model of few positions gets as
    many as it has.
    """
    generator = torch.Generator().manual_seed(20240724)
    count = min(PREFILL + DECODE, cfg.max_position)
    rows = [torch.randperm(cfg.vocab_size, generator=generator)[:count] for _ in range(ROWS)]
    tokens_BT = torch.stack([row.repeat(-(-count // len(row)))[:count] for row in rows])
    taps = Taps(only=lambda name: name.endswith(".expert"))
    logits_BTV, _ = oracle_forward(cfg, params, tokens_BT, taps=taps)
    u = UNIT_ROUNDOFF[str(params.norm.dtype).removeprefix("torch.")]
    moved_BTV, _ = oracle_forward(cfg, params, tokens_BT, taps=Taps(taps.values), noise=u)
    move = (moved_BTV - logits_BTV).abs().max()
    return {"tokens": tokens_BT, "prefill": torch.tensor(count - min(DECODE, count // 2)), "logits": logits_BTV, "moved_max_abs": move}
