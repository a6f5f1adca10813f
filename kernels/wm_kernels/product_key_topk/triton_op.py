"""`product_key_topk` by a Triton kernel. B batch, T tokens, R retrieval heads, d half a query's width, J sub-keys per half, k picks."""

from collections.abc import Callable

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.product_key_topk.plan import plan
from wm_kernels.triton_launch import Plan, architecture, call_key, remember, run, strides
from wm_kernels.triton_support import inner_contiguous

_known: dict[tuple[object, ...], Plan] = {}


def product_key_topk_triton(
    query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int, check: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """See `product_key_topk_reference`; float32, float16 or bfloat16. Halves whose entries do not follow each other are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise many take larger tiles, which add up in another order.
    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    key = (k, *call_key(query_BTR2d, keys_RJ2d))
    made = _known.get(key)
    if made is None and check is not None:
        check()
    query_BTR2d, keys_RJ2d = inner_contiguous(query_BTR2d), inner_contiguous(keys_RJ2d)
    if made is None:
        (B, T, R, _, d), J = query_BTR2d.shape, keys_RJ2d.shape[1]
        arch = architecture(query_BTR2d.device)
        strides_ = strides(query_BTR2d)[:4], strides(keys_RJ2d)[:3]
        made = remember(_known, key, plan(B, T, R, d, J, k, query_BTR2d.dtype, *strides_, arch, exact()))
    shape = (*query_BTR2d.shape[:3], k)
    weight_BTRk, expert_BTRk = query_BTR2d.new_empty(shape), query_BTR2d.new_empty(shape, dtype=torch.int64)
    run(made, {"query_BTR2d": query_BTR2d, "keys_RJ2d": keys_RJ2d, "weight_MRk": weight_BTRk, "expert_MRk": expert_BTRk})
    return weight_BTRk, expert_BTRk
