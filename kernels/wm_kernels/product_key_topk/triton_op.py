"""`product_key_topk` by a Triton kernel. B batch, T tokens, R retrieval heads, d half a query's width, J sub-keys per half, k picks."""

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.product_key_topk.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous


def product_key_topk_triton(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `product_key_topk_reference`; float32, float16 or bfloat16. Halves whose entries do not follow each other are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise many take larger tiles, which add up in another order.
    """
    (B, T, R, _, d), J = query_BTR2d.shape, keys_RJ2d.shape[1]
    query_BTR2d, keys_RJ2d = inner_contiguous(query_BTR2d), inner_contiguous(keys_RJ2d)
    weight_BTRk = torch.empty((B, T, R, k), dtype=query_BTR2d.dtype, device=query_BTR2d.device)
    expert_BTRk = torch.empty((B, T, R, k), dtype=torch.int64, device=query_BTR2d.device)
    arch = architecture(query_BTR2d.device)
    made = plan(B, T, R, d, J, k, query_BTR2d.dtype, strides(query_BTR2d)[:4], strides(keys_RJ2d)[:3], arch, exact())
    run(made, {"query_BTR2d": query_BTR2d, "keys_RJ2d": keys_RJ2d, "weight_MRk": weight_BTRk, "expert_MRk": expert_BTRk})
    return weight_BTRk, expert_BTRk
