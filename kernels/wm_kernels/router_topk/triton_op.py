"""`router_topk` by a Triton kernel. M tokens, E experts, k picks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.router_topk.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run
from wm_kernels.triton_support import row_stride, same_rows

_known: dict[tuple[object, ...], Known] = {}


def router_topk_triton(logits_ME: Tensor, k: int, normalize: bool, check: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
    """See `router_topk_reference`; float32, float16 or bfloat16. Rows that are not contiguous are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise several may share a tile, which adds up in another order.
    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    given = {"logits_ME": same_rows(logits_ME)}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        logits = ready["logits_ME"]
        return plan(*logits.shape, k, logits.dtype, normalize, row_stride(logits), architecture(logits.device), exact())

    made = known_plan(_known, (k, normalize, *call_key(given["logits_ME"])), given, make, check)
    weight_Mk = logits_ME.new_empty((logits_ME.shape[0], k))
    expert_Mk = torch.empty_like(weight_Mk, dtype=torch.int64)
    run(made, {**given, "weight_Mk": weight_Mk, "expert_Mk": expert_Mk})
    return weight_Mk, expert_Mk
