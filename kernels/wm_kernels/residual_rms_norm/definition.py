"""Residual addition and RMS normalisation.

M rows (batch times tokens)   D model
"""

from functools import partial

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served


def residual_rms_norm_reference(
    x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add the residual stream to a block's output, and normalise the sum for the next block.

        sum    = round(x + scale * residual)
        normed = weight * round(sum / sqrt(mean(sum^2) + eps))

    where round casts to the dtype of x: the norm reads the sum that the next layer will read, and the cast comes before the weight.

    Args:
        x_MD: output of the block.
        residual_MD: the residual stream; same dtype.
        scale_D: learned scale of the residual, or None for 1.
        weight_D: weight of the norm.
        eps: added to the mean square; positive.

    Returns:
        (normed_MD, sum_MD) in the dtype of x.

    Raises:
        RuntimeError: shapes or dtypes disagree; the message names both.

    Source:
        Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4); scaled residual: arXiv:2412.11834.
    """
    _check(x_MD, residual_MD, scale_D, weight_D)
    dtype, acc = x_MD.dtype, acc_dtype(x_MD.dtype)
    residual = residual_MD.to(acc) if scale_D is None else scale_D.to(acc) * residual_MD.to(acc)
    sum_MD = (x_MD.to(acc) + residual).to(dtype)
    wide = sum_MD.to(acc)
    unit_MD = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(dtype)
    return (weight_D * unit_MD).to(dtype), sum_MD


def _check(x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor) -> None:
    check_shapes("residual_rms_norm", x_MD=x_MD, residual_MD=residual_MD, scale_D=scale_D, weight_D=weight_D)
    check_dtype("residual_rms_norm", x_MD.dtype, residual_MD=residual_MD)


@torch.library.custom_op("wm::residual_rms_norm", mutates_args=())
def residual_rms_norm(x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `residual_rms_norm_reference`."""
    normed_MD, sum_MD = residual_rms_norm_reference(x_MD, residual_MD, scale_D, weight_D, eps)
    return normed_MD.contiguous(), sum_MD.contiguous()


@register_kernel(residual_rms_norm, "cuda")
def _(x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not served(x_MD, scale_D, weight_D) or not x_MD.numel():
        normed_MD, sum_MD = residual_rms_norm_reference(x_MD, residual_MD, scale_D, weight_D, eps)
        return normed_MD.contiguous(), sum_MD.contiguous()
    from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton

    check = partial(_check, x_MD, residual_MD, scale_D, weight_D)
    return residual_rms_norm_triton(x_MD, residual_MD, scale_D, weight_D, eps, check)


@residual_rms_norm.register_fake
def _(x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x_MD, residual_MD, scale_D, weight_D)
    return x_MD.new_empty(x_MD.shape), x_MD.new_empty(x_MD.shape)


register_reference_autograd(residual_rms_norm, residual_rms_norm_reference)
