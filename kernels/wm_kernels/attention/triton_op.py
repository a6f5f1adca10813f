"""Attention over contiguous cells by Triton kernels: tensors to a plan and back.

B batch   T tokens   H query heads   K key/value heads   A score heads   P head dimension   L cells
"""

import torch
from torch import Tensor

from wm_kernels.attention.plan import planned
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import run
from wm_kernels.triton_support import inner_contiguous


def attend_triton(
    q_BTHP: Tensor,
    k_BKLP: Tensor,
    v_BKLP: Tensor,
    position_B: Tensor | None,
    score_BAL: Tensor | None = None,
    scoring: str = "none",
) -> Tensor:
    """Softmax attention of token t to cells 0 .. position + t, for float32, float16 and bfloat16.

    In `numerics` "exact", T tokens over a cache give the bits of T calls of one token, and of any split.

    Args:
        q_BTHP: queries, already rotated.
        k_BKLP: keys; those of the tokens are in place.
        v_BKLP: their values.
        position_B: cells in use before the tokens, int64; None is 0 for every row.
        score_BAL: a score per cell, float32; None in scoring "none".
        scoring: "none", or "additive" or "binary" as in `scored_attention`.

    Returns:
        out_BTHP, contiguous. Any outer strides are read as they are; tensors whose last axis is not contiguous are copied.
    """
    tensors = {"q": inner_contiguous(q_BTHP), "k": inner_contiguous(k_BKLP), "v": inner_contiguous(v_BKLP)}
    if score_BAL is not None:
        tensors["score"] = score_BAL
    if position_B is not None:
        tensors["position"] = position_B.contiguous()
    out_BTHP = torch.empty(q_BTHP.shape, dtype=q_BTHP.dtype, device=q_BTHP.device)
    layout = tuple((name, tensor.shape, tensor.stride()) for name, tensor in tensors.items())
    run(planned(layout, scoring, exact(), q_BTHP.dtype, q_BTHP.device), {**tensors, "out": out_BTHP})
    return out_BTHP
