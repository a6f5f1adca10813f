"""`selective_scan` by Triton kernels. B batch, T tokens, C channels, N state."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.selective_scan.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run, strides

NAMES = ("x_BTC", "dt_BTC", "A_CN", "B_BTN", "C_BTN", "before", "after", "valid_B")


_known: dict[tuple[object, ...], Known] = {}


def selective_scan_triton(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
    after_BCN: Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`; x float32, float16 or bfloat16. Tensors whose last axis has a stride are copied first.

    The new state is written into `after_BCN`, which may be `state_BCN`; None makes a tensor. `check` raises where arguments are wrong; it
    is called unless a call of the same shapes and dtypes has passed it.
    """
    tensors = (x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, after_BCN, valid_B)
    given = {name: value for name, value in zip(NAMES, tensors, strict=True) if value is not None}
    made = known_plan(_known, call_key(*tensors), given, _planned, check)
    if after_BCN is None:
        given["after"] = dt_BTC.new_empty((x_BTC.shape[0], *A_CN.shape))
    written = given["after"]
    if state_BCN is None:
        given["before"] = written  # a stand-in, which is never read, as for valid lengths
    if valid_B is None:
        given["valid_B"] = x_BTC
    y_BTC = given["y_BTC"] = x_BTC.new_empty(x_BTC.shape)
    run(made, given)
    if after_BCN is not None and written is not after_BCN:
        after_BCN.copy_(written)
    return y_BTC, written if after_BCN is None else after_BCN


def _planned(ready: Mapping[str, Tensor]) -> Plan:
    x, A = ready["x_BTC"], ready["A_CN"]
    (B, T, C), N = x.shape, A.shape[1]
    after = ready["after"] if "after" in ready else torch.empty((B, C, N), device="meta")
    before = ready.get("before", after)
    by_token = [strides(ready[name])[:2] for name in ("x_BTC", "dt_BTC", "B_BTN", "C_BTN")]
    return plan(
        B,
        T,
        C,
        N,
        x.dtype,
        ("valid_B" in ready, "before" in ready),
        (*by_token[0], *by_token[1], strides(A)[0], *by_token[2], *by_token[3]),
        (*strides(before)[:2], *strides(after)[:2]),
        architecture(x.device),
        exact(),
    )
