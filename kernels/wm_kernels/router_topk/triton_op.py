"""`router_topk` by a Triton kernel. M tokens, E experts, k picks."""

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.router_topk.plan import plan
from wm_kernels.triton_launch import architecture, run
from wm_kernels.triton_support import rows_of


def router_topk_triton(logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `router_topk_reference`; float32, float16 or bfloat16. Rows that are not contiguous are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise several may share a tile, which adds up in another order.
    """
    (M, E), (logits_ME, stride) = logits_ME.shape, rows_of(logits_ME)
    weight_Mk = torch.empty((M, k), dtype=logits_ME.dtype, device=logits_ME.device)
    expert_Mk = torch.empty((M, k), dtype=torch.int64, device=logits_ME.device)
    made = plan(M, E, k, logits_ME.dtype, normalize, stride, architecture(logits_ME.device), exact())
    run(made, {"logits_ME": logits_ME, "weight_Mk": weight_Mk, "expert_Mk": expert_Mk})
    return weight_Mk, expert_Mk
