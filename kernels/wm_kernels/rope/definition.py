"""Rotary position embedding.

B batch   T tokens   H heads   P head dimension   F rotated pairs
"""

from functools import partial

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served


def rope_reference(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """Rotate the first 2F entries of every head by the token's angles.

        y[j]     = x[j] cos[j] - x[F + j] sin[j]
        y[F + j] = x[F + j] cos[j] + x[j] sin[j]        j = 0 .. F - 1

    Entries from 2F on pass through. Pairs are (j, F + j), the half-split layout, not neighbours.

    Args:
        x_BTHP: vectors to rotate; any float dtype.
        cos_BTF: cosines from `rope_angles`; 2F <= P.
        sin_BTF: sines from `rope_angles`.

    Returns:
        y_BTHP in the dtype of x; computed in float32, or float64 for float64.

    Raises:
        RuntimeError: shapes disagree or 2F > P; the message names both.

    Source:
        Su et al. 2021, RoFormer, arXiv:2104.09864, eq. (34).
    """
    _check(x_BTHP, cos_BTF, sin_BTF)
    acc, F = acc_dtype(x_BTHP.dtype), cos_BTF.shape[-1]
    low, high = x_BTHP[..., :F].to(acc), x_BTHP[..., F : 2 * F].to(acc)
    cos_BT1F, sin_BT1F = cos_BTF.to(acc).unsqueeze(2), sin_BTF.to(acc).unsqueeze(2)
    rotated = torch.cat([low * cos_BT1F - high * sin_BT1F, high * cos_BT1F + low * sin_BT1F], -1).to(x_BTHP.dtype)
    return torch.cat([rotated, x_BTHP[..., 2 * F :]], -1)


def _check(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> None:
    size = check_shapes("rope", x_BTHP=x_BTHP, cos_BTF=cos_BTF, sin_BTF=sin_BTF)
    check_that("rope", 2 * size["F"] <= size["P"], lambda: f"2F = {2 * size['F']} entries are rotated, expected at most P = {size['P']}")


@torch.library.custom_op("wm::rope", mutates_args=())
def rope(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """See `rope_reference`."""
    return rope_reference(x_BTHP, cos_BTF, sin_BTF).contiguous()


@register_kernel(rope, "cuda")
def _(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    if not served(x_BTHP, cos_BTF, sin_BTF) or not x_BTHP.numel() or not cos_BTF.numel():
        return rope_reference(x_BTHP, cos_BTF, sin_BTF).contiguous()
    from wm_kernels.rope.triton_op import rope_triton

    return rope_triton(x_BTHP, cos_BTF, sin_BTF, partial(_check, x_BTHP, cos_BTF, sin_BTF))


@rope.register_fake
def _(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    _check(x_BTHP, cos_BTF, sin_BTF)
    return x_BTHP.new_empty(x_BTHP.shape)


register_reference_autograd(rope, rope_reference)
