"""Depthwise causal convolution.

B batch   T tokens   C channels   L taps of the filter   Y = L - 1 inputs kept   S = Y + T inputs read
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "silu": F.silu}


def causal_conv1d_reference(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor | None, valid_B: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Filter each channel over its last L inputs.

        y_t = act(bias + sum_l weight_l x_(t - Y + l))        l = 0 .. Y, the last tap meets the present token

    where x_(-Y) .. x_(-1) is the state.

    Args:
        x_BTC: inputs; any float dtype.
        weight_CL: taps, oldest input first.
        bias_C: added before the activation; None is zero.
        state_BYC: the Y inputs before the first token, the latest last; float32, or float64 for float64 x; None is zero.
            With L = 1 it is empty.
        valid_B: tokens of each row that count, int64, 0 <= valid <= T; None is T. Later tokens leave the state unchanged
            and their outputs are finite and without meaning.
        activation: "none" or "silu".

    Returns:
        (y_BTC in the dtype of x, state_BYC: the Y inputs up to the last valid token, before any activation). Sums are float32,
        or float64 for float64 x. Arguments are left unchanged.

    Raises:
        RuntimeError: shapes or dtypes disagree, L is 0, or the activation is unknown; the message names both.

    Source:
        Gu & Dao 2023, arXiv:2312.00752, section 3.4; Dao & Gu 2024, arXiv:2405.21060, figure 6.
    """
    _check("causal_conv1d", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    return _conv(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)


def _conv(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor | None, valid_B: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    acc, (B, T, C), L = acc_dtype(x_BTC.dtype), x_BTC.shape, weight_CL.shape[1]
    before_BYC = x_BTC.new_zeros((B, L - 1, C), dtype=acc) if state_BYC is None else state_BYC
    x_BSC = torch.cat([before_BYC, x_BTC.to(acc)], 1)
    weight_LC = weight_CL.to(acc).t()
    y_BTC = x_BSC[:, :T] * weight_LC[0]
    for tap in range(1, L):
        y_BTC = torch.addcmul(y_BTC, x_BSC[:, tap : tap + T], weight_LC[tap])
    if bias_C is not None:
        y_BTC = y_BTC + bias_C.to(acc)
    if valid_B is None:
        after_BYC = x_BSC[:, T:]
    else:
        index_BY = valid_B.unsqueeze(1) + torch.arange(L - 1, device=valid_B.device)
        after_BYC = x_BSC.gather(1, index_BY.unsqueeze(-1).expand(B, L - 1, C))
    return ACTIVATIONS[activation](y_BTC).to(x_BTC.dtype), after_BYC


def _check(
    op: str,
    x_BTC: Tensor,
    weight_CL: Tensor,
    bias_C: Tensor | None,
    state_BYC: Tensor | None,
    valid_B: Tensor | None,
    activation: str,
) -> None:
    size = check_shapes(op, x_BTC=x_BTC, weight_CL=weight_CL, bias_C=bias_C, state_BYC=state_BYC, valid_B=valid_B)
    check_dtype(op, acc_dtype(x_BTC.dtype), state_BYC=state_BYC)
    check_dtype(op, torch.int64, valid_B=valid_B)
    check_that(op, size["L"] >= 1, lambda: "L is 0, expected at least 1")
    if state_BYC is not None:
        check_that(op, size["Y"] == size["L"] - 1, lambda: f"state_BYC holds Y = {size['Y']} inputs, expected L - 1 = {size['L'] - 1}")
    check_that(op, activation in ACTIVATIONS, lambda: f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


@torch.library.custom_op("wm::causal_conv1d", mutates_args=())
def causal_conv1d(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor | None, valid_B: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """See `causal_conv1d_reference`."""
    y_BTC, state = causal_conv1d_reference(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    return y_BTC.contiguous(), state.contiguous()


@register_kernel(causal_conv1d, "cuda")
def _(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor | None, valid_B: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    check = partial(_check, "causal_conv1d", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    if not served(x_BTC, weight_CL, bias_C):
        check()
        y_BTC, state = _conv(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
        return y_BTC.contiguous(), state.contiguous()
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

    return causal_conv1d_triton(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation, check=check)


@causal_conv1d.register_fake
def _(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor | None, valid_B: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    _check("causal_conv1d", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    B, _, C = x_BTC.shape
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((B, weight_CL.shape[1] - 1, C), dtype=acc_dtype(x_BTC.dtype))


register_reference_autograd(causal_conv1d, causal_conv1d_reference)


@torch.library.custom_op("wm::causal_conv1d_", mutates_args=("state_BYC",))
def causal_conv1d_(
    x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor, valid_B: Tensor | None, activation: str
) -> Tensor:
    """`causal_conv1d` that writes the new state into `state_BYC`; see `causal_conv1d_reference`."""
    _check("causal_conv1d_", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    y_BTC, state = _conv(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    state_BYC.copy_(state)
    return y_BTC.contiguous()


@register_kernel(causal_conv1d_, "cuda")
def _(x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor, valid_B: Tensor | None, activation: str) -> Tensor:
    check = partial(_check, "causal_conv1d_", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    if not served(x_BTC, weight_CL, bias_C):
        check()
        y_BTC, state = _conv(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
        state_BYC.copy_(state)
        return y_BTC.contiguous()
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

    return causal_conv1d_triton(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation, state_BYC, check)[0]


@causal_conv1d_.register_fake
def _(x_BTC: Tensor, weight_CL: Tensor, bias_C: Tensor | None, state_BYC: Tensor, valid_B: Tensor | None, activation: str) -> Tensor:
    _check("causal_conv1d_", x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation)
    return x_BTC.new_empty(x_BTC.shape)
