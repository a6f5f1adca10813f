"""`causal_conv1d` by a Triton kernel. B batch, T tokens, C channels, L taps, Y = L - 1."""

import torch
from torch import Tensor

from wm_kernels.causal_conv1d.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous


def causal_conv1d_triton(
    x_BTC: Tensor,
    weight_CL: Tensor,
    bias_C: Tensor | None,
    state_BYC: Tensor | None,
    valid_B: Tensor | None,
    activation: str,
    after_BYC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `causal_conv1d_reference`; float32, float16 or bfloat16.

    Args:
        x_BTC: inputs; copied first where the channels of a token do not follow each other.
        weight_CL: taps.
        bias_C: added before the activation, or None.
        state_BYC: inputs before the first token, or None.
        valid_B: tokens of each row that count, or None.
        activation: "none" or "silu".
        after_BYC: where the new state is written, which may be `state_BYC`; None makes a tensor.

    Returns:
        (y_BTC, the new state).
    """
    (B, T, C), L = x_BTC.shape, weight_CL.shape[1]
    x_BTC, weight_CL = inner_contiguous(x_BTC), inner_contiguous(weight_CL)
    y_BTC = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    before = None if state_BYC is None else inner_contiguous(state_BYC)
    target = torch.empty((B, L - 1, C), dtype=torch.float32, device=x_BTC.device) if after_BYC is None else after_BYC
    written = inner_contiguous(target)
    tensors = {
        "x_BTC": x_BTC,
        "weight_CL": weight_CL,
        "bias_C": weight_CL if bias_C is None else bias_C.contiguous(),
        "before_BYC": written if before is None else before,
        "valid_B": x_BTC if valid_B is None else valid_B.contiguous(),
        "y_BTC": y_BTC,
        "after_BYC": written,
    }
    made = plan(
        B,
        T,
        C,
        L,
        x_BTC.dtype,
        (bias_C is not None, state_BYC is not None, valid_B is not None),
        activation == "silu",
        _pair(x_BTC),
        weight_CL.stride(0),
        _pair(tensors["before_BYC"]),
        _pair(written),
        architecture(x_BTC.device),
    )
    run(made, tensors)
    if after_BYC is not None and written is not after_BYC:
        after_BYC.copy_(written)
    return y_BTC, written if after_BYC is None else after_BYC


def _pair(tensor: Tensor) -> tuple[int, int]:
    first, second, _ = strides(tensor)
    return first, second
