"""A linear layer with what follows it: parts in tensors of their own, step sizes, a gate.

M rows (batch times tokens)   K inputs   N outputs before gates   A, B, C, H widths of the parts
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served

IDENTITY = 40.0  # from where softplus(x) is x in float64 too; torch's own threshold, 20, is 2e-9 early
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_reference(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, step_bias_H: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> Parts:
    """A linear layer whose outputs leave as mixers and feed-forwards want them, without a pass over them in between.

        y = x W^T + bias                                              [M, N]
        parts: a, b, c = y[:, :A], y[:, A:A+B], y[:, A+B:A+B+C]       dt = softplus(y[:, A+B+C:] + step_bias)
        gated: a = SiLU(y[:, :A]) * y[:, A:]

    Args:
        x_MK: rows.
        weight_NK: weight, as torch's linear layers hold it; dtype of x.
        bias_N: added to every row, or None; dtype of x.
        step_bias_H: added to the last part, or None; dtype of x.
        A: width of the first part, or of what is gated.
        B: width of the second part; 0 if there is none, as of all parts.
        C: width of the third part.
        H: width of the last part, step sizes.
        gated: gate the first half of y's columns by the second; there is one part then.

    Returns:
        (a_MA, b_MB, c_MC, dt_MH): dt in float32 (float64 of float64), the others in the dtype of x.

    Raises:
        RuntimeError: shapes, dtypes or widths disagree; the message names both.

    Source:
        Dao & Gu 2024, arXiv:2405.21060, section 7 (one projection for all inputs of a scan); gate: Shazeer 2020, arXiv:2002.05202.
    """
    _check(x_MK, weight_NK, bias_N, step_bias_H, A, B, C, H, gated)
    acc = acc_dtype(x_MK.dtype)
    y_MN = F.linear(x_MK, weight_NK, bias_N)
    if gated:
        gate_MA, up_MA = y_MN.to(acc).chunk(2, -1)
        y_MN = (F.silu(gate_MA) * up_MA).to(x_MK.dtype)
    a_MA, b_MB, c_MC, dt_MH = y_MN.split([A, B, C, H], -1)
    dt_MH = dt_MH.to(acc) if step_bias_H is None else dt_MH.to(acc) + step_bias_H.to(acc)
    return a_MA, b_MB, c_MC, F.softplus(dt_MH, threshold=IDENTITY)


def _check(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, step_bias_H: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> None:
    size = check_shapes("linear", x_MK=x_MK, weight_NK=weight_NK, bias_N=bias_N, step_bias_H=step_bias_H)
    check_dtype("linear", x_MK.dtype, weight_NK=weight_NK, bias_N=bias_N, step_bias_H=step_bias_H)
    widths = f"A {A}, B {B}, C {C}, H {H}"
    check_that("linear", min(A, B, C, H) >= 0, lambda: f"widths are {widths}, expected none below 0")
    if gated:
        check_that("linear", B + C + H == 0, lambda: f"widths are {widths}, expected A alone where it is gated")
    total = 2 * A if gated else A + B + C + H
    check_that("linear", total == size["N"], lambda: f"widths are {widths}, of {total} outputs, expected N = {size['N']}")
    check_that("linear", step_bias_H is None or size["H"] == H, lambda: f"step_bias_H has {size['H']} entries, expected H = {H}")


@torch.library.custom_op("wm::linear", mutates_args=())
def linear(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, step_bias_H: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `linear_reference`."""
    return _apart(linear_reference(x_MK, weight_NK, bias_N, step_bias_H, A, B, C, H, gated))


def _apart(parts: Parts) -> Parts:
    """Each in memory of its own."""
    a_MA, b_MB, c_MC, dt_MH = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return a_MA, b_MB, c_MC, dt_MH


@register_kernel(linear, "cuda")
def _(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, step_bias_H: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> Parts:
    if not served(x_MK) or not x_MK.numel() or not weight_NK.numel():
        return _apart(linear_reference(x_MK, weight_NK, bias_N, step_bias_H, A, B, C, H, gated))
    from wm_kernels.linear.triton_op import linear_triton

    check = partial(_check, x_MK, weight_NK, bias_N, step_bias_H, A, B, C, H, gated)
    return linear_triton(x_MK, weight_NK, bias_N, step_bias_H, (A, B, C, H), gated, check)


@linear.register_fake
def _(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, step_bias_H: Tensor | None, A: int, B: int, C: int, H: int, gated: bool
) -> Parts:
    _check(x_MK, weight_NK, bias_N, step_bias_H, A, B, C, H, gated)
    rows = x_MK.shape[0]
    a_MA, b_MB, c_MC = (x_MK.new_empty((rows, width)) for width in (A, B, C))
    return a_MA, b_MB, c_MC, x_MK.new_empty((rows, H), dtype=acc_dtype(x_MK.dtype))


register_reference_autograd(linear, linear_reference)
