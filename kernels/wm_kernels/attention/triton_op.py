"""Attention over contiguous cells by Triton kernels: tensors to a plan and back.

B batch   T tokens   H query heads   K key/value heads   A score heads   P head dimension   L cells
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from wm_kernels.attention.plan import planned
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, Plan, call_key, known_plan, run
from wm_kernels.triton_support import inner_contiguous

NAMES = ("q", "k", "v", "score", "position", "new_k", "new_v")


_known: dict[tuple[object, ...], Known] = {}


def attend_triton(
    q_BTHP: Tensor,
    k_BKLP: Tensor,
    v_BKLP: Tensor,
    position_B: Tensor | None,
    score_BAL: Tensor | None = None,
    scoring: str = "none",
    new: tuple[Tensor, Tensor] | None = None,
    check: tuple[Callable[..., None], Sequence[Tensor | None]] | None = None,
) -> Tensor:
    """Softmax attention of token t to cells 0 .. position + t, for float32, float16 and bfloat16.

    In `numerics` "exact", T tokens over a cache give the bits of T calls of one token, and of any split.

    Args:
        q_BTHP: queries, already rotated.
        k_BKLP: keys; those of the tokens are in place, unless they are given too.
        v_BKLP: their values.
        position_B: cells in use before the tokens, int64; None is 0 for every row.
        score_BAL: a score per cell, float32; None in scoring "none".
        scoring: "none", or "additive" or "binary" as in `scored_attention`.
        new: keys and values of the tokens, [B, T, K, P], to write into cells position + t first; rows of k and v must be contiguous then.
        check: what raises where arguments are wrong, called unless a call of the same shapes and dtypes has passed it; and tensors that it
            looks at beside those above.

    Returns:
        out_BTHP, contiguous. Any outer strides are read as they are; tensors whose last axis is not contiguous are copied.
    """
    tensors = (q_BTHP, k_BKLP, v_BKLP, score_BAL, position_B, *(new or (None, None)))
    function, others = check or (None, ())
    given = {name: value for name, value in zip(NAMES, tensors, strict=True) if value is not None}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        layout = tuple((name, tensor.shape, tensor.stride()) for name, tensor in ready.items())
        return planned(layout, scoring, exact(), q_BTHP.dtype, q_BTHP.device)

    made = known_plan(_known, (scoring, *call_key(*tensors, *others)), given, make, function, _copied)
    out_BTHP = torch.empty_like(q_BTHP, memory_format=torch.contiguous_format)
    run(made, {**given, "out": out_BTHP})
    return out_BTHP


def _copied(name: str, tensor: Tensor) -> bool:
    if name == "position":
        return not tensor.is_contiguous()
    return name != "score" and inner_contiguous(tensor) is not tensor
