"""`product_key_topk` by a Triton kernel. B batch, T tokens, R retrieval heads, d half a query's width, J sub-keys per half, k picks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.product_key_topk.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run, strides

_known: dict[tuple[object, ...], Known] = {}


def product_key_topk_triton(
    query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int, check: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """See `product_key_topk_reference`; float32, float16 or bfloat16. Halves whose entries do not follow each other are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise many take larger tiles, which add up in another order.
    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    given = {"query_BTR2d": query_BTR2d, "keys_RJ2d": keys_RJ2d}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        query, keys = ready.values()
        (B, T, R, _, d), J = query.shape, keys.shape[1]
        return plan(B, T, R, d, J, k, query.dtype, strides(query)[:4], strides(keys)[:3], architecture(query.device), exact())

    made = known_plan(_known, (k, *call_key(query_BTR2d, keys_RJ2d)), given, make, check)
    shape = (*query_BTR2d.shape[:3], k)
    weight_BTRk, expert_BTRk = query_BTR2d.new_empty(shape), query_BTR2d.new_empty(shape, dtype=torch.int64)
    run(made, {**given, "weight_MRk": weight_BTRk, "expert_MRk": expert_BTRk})
    return weight_BTRk, expert_BTRk
