"""Attention over contiguous cells by Triton kernels: tensors to a plan and back.

B batch   T tokens   H query heads   K key/value heads   A score heads   P head dimension   L cells
"""

import torch
from torch import Tensor

from wm_kernels.attention.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
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
    (B, T, H, P), (K, L) = q_BTHP.shape, k_BKLP.shape[1:3]
    tensors = {"q": inner_contiguous(q_BTHP), "k": inner_contiguous(k_BKLP), "v": inner_contiguous(v_BKLP)}
    layout = {"q": strides(tensors["q"]), **{name: _cells_first(tensors[name]) for name in "kv"}}
    A = 1
    if score_BAL is not None:
        tensors["score"], layout["score"], A = score_BAL, strides(score_BAL), score_BAL.shape[1]
    if position_B is not None:
        tensors["position"] = position_B.contiguous()
    out_BTHP = torch.empty((B, T, H, P), dtype=q_BTHP.dtype, device=q_BTHP.device)
    dims = (B, T, H, K, A, P, L, scoring, position_B is not None)
    run(plan(*dims, q_BTHP.dtype, architecture(q_BTHP.device), tuple(layout.items())), {**tensors, "out": out_BTHP})
    return out_BTHP


def _cells_first(x_BKLP: Tensor) -> tuple[int, ...]:
    """Strides as of x_BLKP, which tokens have."""
    b, k, cell, p = strides(x_BKLP)
    return b, cell, k, p
