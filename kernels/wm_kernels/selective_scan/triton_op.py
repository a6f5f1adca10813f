"""`selective_scan` by Triton kernels. B batch, T tokens, C channels, N state."""

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.selective_scan.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous


def selective_scan_triton(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
    after_BCN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`; x float32, float16 or bfloat16. Tensors whose last axis has a stride are copied first.

    The new state is written into `after_BCN`, which may be `state_BCN`; None makes a tensor.
    """
    (B, T, C), N = x_BTC.shape, A_CN.shape[1]
    x, dt, A, b, c = (inner_contiguous(tensor) for tensor in (x_BTC, dt_BTC, A_CN, B_BTN, C_BTN))
    y_BTC = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    target = torch.empty((B, C, N), dtype=torch.float32, device=x_BTC.device) if after_BCN is None else after_BCN
    written = inner_contiguous(target)
    before = written if state_BCN is None else inner_contiguous(state_BCN)
    made = plan(
        B,
        T,
        C,
        N,
        x.dtype,
        (valid_B is not None, state_BCN is not None),
        (*strides(x)[:2], *strides(dt)[:2], strides(A)[0], *strides(b)[:2], *strides(c)[:2]),
        (*strides(before)[:2], *strides(written)[:2]),
        architecture(x.device),
        exact(),
    )
    tensors = {
        "x_BTC": x,
        "dt_BTC": dt,
        "A_CN": A,
        "B_BTN": b,
        "C_BTN": c,
        "valid_B": x if valid_B is None else valid_B.contiguous(),
        "before": before,
        "y_BTC": y_BTC,
        "after": written,
    }
    run(made, tensors)
    if after_BCN is not None and written is not after_BCN:
        after_BCN.copy_(written)
    return y_BTC, written if after_BCN is None else after_BCN
