"""Product-key retrieval.

B batch   T tokens   R retrieval heads   d half a query's width   J sub-keys per half   k picks   E = J*J experts
"""

from functools import partial

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served

MOST_PICKS = 64  # of the CUDA kernel, which keeps the best of every half in registers; more are the reference's


def ordered_topk(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of the last axis and their indices, by larger score first, then lower index.

    `torch.topk` leaves the order of equal scores open; a stable sort does not.
    """
    value, index = torch.sort(score, dim=-1, descending=True, stable=True)
    return value[..., :k], index[..., :k]


def product_key_topk_reference(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose k of E = J^2 experts per token and retrieval head, and weight them by a softmax.

        s_x[i] = query[0] · keys[i, 0]        s_y[j] = query[1] · keys[j, 1]
        score of expert i J + j = s_x[i] + s_y[j],  i and j among the k best of their halves
        weight = softmax over the k best scores

    Equal scores go to the lower index, in each half and among experts.

    Args:
        query_BTR2d: the two halves of every head's query.
        keys_RJ2d: J sub-keys per head and half; same dtype.
        k: number of experts; 1 <= k <= J.

    Returns:
        (weight_BTRk in the query's dtype, expert_BTRk int64), best first. Scores and softmax are float32, or float64 for float64.

    Raises:
        RuntimeError: shapes or dtypes disagree, or k is out of range; the message names both.

    Source:
        He 2024, PEER, arXiv:2407.04153, section 2.2; arXiv:2412.11834.
    """
    _check(query_BTR2d, keys_RJ2d, k)
    acc, J = acc_dtype(query_BTR2d.dtype), keys_RJ2d.shape[1]
    score_2BTRJ = torch.einsum("btrhd,rjhd->hbtrj", query_BTR2d.to(acc), keys_RJ2d.to(acc))
    # Sub-keys in ascending order make the k*k grid ascend in expert index, so that a stable sort breaks its ties rightly.
    index_2BTRk = ordered_topk(score_2BTRJ.detach(), k)[1].sort(-1).values
    x_BTRk, y_BTRk = score_2BTRJ.gather(-1, index_2BTRk).unbind(0)
    i_BTRk, j_BTRk = index_2BTRk.unbind(0)
    grid = (x_BTRk.unsqueeze(-1) + y_BTRk.unsqueeze(-2)).flatten(-2)
    expert_grid = (i_BTRk.unsqueeze(-1) * J + j_BTRk.unsqueeze(-2)).flatten(-2)
    score_BTRk, pick_BTRk = ordered_topk(grid, k)
    return torch.softmax(score_BTRk, -1).to(query_BTR2d.dtype), expert_grid.gather(-1, pick_BTRk)


def _check(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> None:
    size = check_shapes("product_key_topk", query_BTR2d=query_BTR2d, keys_RJ2d=keys_RJ2d)
    check_dtype("product_key_topk", query_BTR2d.dtype, keys_RJ2d=keys_RJ2d)
    check_that("product_key_topk", k >= 1, lambda: f"k is {k}, expected at least 1")
    check_that("product_key_topk", k <= size["J"], lambda: f"k is {k}, expected at most J = {size['J']}, the sub-keys of one half")


@torch.library.custom_op("wm::product_key_topk", mutates_args=())
def product_key_topk(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `product_key_topk_reference`."""
    weight_BTRk, expert_BTRk = product_key_topk_reference(query_BTR2d, keys_RJ2d, k)
    return weight_BTRk.contiguous(), expert_BTRk.contiguous()


@register_kernel(product_key_topk, "cuda")
def _(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if not served(query_BTR2d) or not query_BTR2d.numel() or k > MOST_PICKS:
        weight_BTRk, expert_BTRk = product_key_topk_reference(query_BTR2d, keys_RJ2d, k)
        return weight_BTRk.contiguous(), expert_BTRk.contiguous()
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

    return product_key_topk_triton(query_BTR2d, keys_RJ2d, k, partial(_check, query_BTR2d, keys_RJ2d, k))


@product_key_topk.register_fake
def _(query_BTR2d: Tensor, keys_RJ2d: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(query_BTR2d, keys_RJ2d, k)
    shape = (*query_BTR2d.shape[:3], k)
    return query_BTR2d.new_empty(shape), query_BTR2d.new_empty(shape, dtype=torch.int64)


register_reference_autograd(product_key_topk, product_key_topk_reference)
