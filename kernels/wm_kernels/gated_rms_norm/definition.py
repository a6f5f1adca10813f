"""Gated RMS normalisation.

M rows (batch times tokens)   C channels
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served


def gated_rms_norm_reference(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Gate a mixer's output, and normalise the product.

        g   = y * z * sigmoid(z)
        out = weight * round(g / sqrt(mean(g^2) + eps))

    where round casts to the dtype of y: the gate comes before the norm, and the cast before the weight, as in transformers' Mamba-2.

    Args:
        y_MC: output of the mixer.
        z_MC: the gate, before its SiLU; same dtype.
        weight_C: weight of the norm.
        eps: added to the mean square; positive.

    Returns:
        out_MC in the dtype of y; the gate and the norm are float32, or float64 for float64 y.

    Raises:
        RuntimeError: shapes or dtypes disagree; the message names both.

    Source:
        Dao & Gu 2024, arXiv:2405.21060, section 7.2; the order of gate and norm: `MambaRMSNormGated` of transformers.
    """
    _check(y_MC, z_MC, weight_C)
    dtype, acc = y_MC.dtype, acc_dtype(y_MC.dtype)
    gated_MC = y_MC.to(acc) * F.silu(z_MC.to(acc))
    unit_MC = (gated_MC * torch.rsqrt(gated_MC.square().mean(-1, keepdim=True) + eps)).to(dtype)
    return (weight_C * unit_MC).to(dtype)


def _check(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor) -> None:
    check_shapes("gated_rms_norm", y_MC=y_MC, z_MC=z_MC, weight_C=weight_C)
    check_dtype("gated_rms_norm", y_MC.dtype, z_MC=z_MC)


@torch.library.custom_op("wm::gated_rms_norm", mutates_args=())
def gated_rms_norm(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """See `gated_rms_norm_reference`."""
    return gated_rms_norm_reference(y_MC, z_MC, weight_C, eps).contiguous()


@register_kernel(gated_rms_norm, "cuda")
def _(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    if not served(y_MC, weight_C) or not y_MC.numel():
        return gated_rms_norm_reference(y_MC, z_MC, weight_C, eps).contiguous()
    from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton

    return gated_rms_norm_triton(y_MC, z_MC, weight_C, eps, partial(_check, y_MC, z_MC, weight_C))


@gated_rms_norm.register_fake
def _(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    _check(y_MC, z_MC, weight_C)
    return y_MC.new_empty(y_MC.shape)


register_reference_autograd(gated_rms_norm, gated_rms_norm_reference)
