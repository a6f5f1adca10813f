"""Choice of a token's experts by a router.

M tokens   E experts   k picks
"""

from functools import partial

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.product_key_topk.definition import ordered_topk
from wm_kernels.triton_support import served

# Of the CUDA kernel, which holds a token's logits in registers and finds one pick after another; more are the reference's.
MOST_EXPERTS, MOST_PICKS = 8192, 64


def router_topk_reference(logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the k likeliest of E experts per token, weighted by their probabilities.

        p = softmax(logits) over all E        weight = p of the k largest        normalize: weight / sum of the k

    Equal logits go to the lower index.

    Args:
        logits_ME: the router's logits.
        k: number of experts; 1 <= k <= E.
        normalize: whether the k weights of a token sum to 1.

    Returns:
        (weight_Mk in the dtype of the logits, expert_Mk int64), best first. The softmax is float32, or float64 for float64.

    Raises:
        RuntimeError: the logits are not of two dimensions, or k is out of range; the message names both.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538, section 2.1; without the renormalisation: Jamba, arXiv:2403.19887.
    """
    _check(logits_ME, k)
    wide_ME = logits_ME.to(acc_dtype(logits_ME.dtype))
    # Ordered by logits: of two that differ by little, rounding can make one probability, and a tie would be of the arithmetic's making.
    expert_Mk = ordered_topk(wide_ME.detach(), k)[1]
    # Over the k alone, softmax is the renormalised weight.
    weight_Mk = torch.softmax(wide_ME.gather(-1, expert_Mk), -1) if normalize else torch.softmax(wide_ME, -1).gather(-1, expert_Mk)
    return weight_Mk.to(logits_ME.dtype), expert_Mk


def _check(logits_ME: Tensor, k: int) -> None:
    size = check_shapes("router_topk", logits_ME=logits_ME)
    check_that("router_topk", k >= 1, lambda: f"k is {k}, expected at least 1")
    check_that("router_topk", k <= size["E"], lambda: f"k is {k}, expected at most E = {size['E']}, the experts")


@torch.library.custom_op("wm::router_topk", mutates_args=())
def router_topk(logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """See `router_topk_reference`."""
    weight_Mk, expert_Mk = router_topk_reference(logits_ME, k, normalize)
    return weight_Mk.contiguous(), expert_Mk.contiguous()


@register_kernel(router_topk, "cuda")
def _(logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    if not served(logits_ME) or not logits_ME.numel() or logits_ME.shape[-1] > MOST_EXPERTS or k > MOST_PICKS:
        weight_Mk, expert_Mk = router_topk_reference(logits_ME, k, normalize)
        return weight_Mk.contiguous(), expert_Mk.contiguous()
    from wm_kernels.router_topk.triton_op import router_topk_triton

    return router_topk_triton(logits_ME, k, normalize, partial(_check, logits_ME, k))


@router_topk.register_fake
def _(logits_ME: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    _check(logits_ME, k)
    shape = (logits_ME.shape[0], k)
    return logits_ME.new_empty(shape), logits_ME.new_empty(shape, dtype=torch.int64)


register_reference_autograd(router_topk, router_topk_reference)
