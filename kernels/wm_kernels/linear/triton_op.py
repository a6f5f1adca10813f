"""`linear` by Triton kernels."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wm_kernels.linear.definition import Parts
from wm_kernels.linear.plan import LinearCall, plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run

_known: dict[tuple[object, ...], Known] = {}


def linear_triton(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    step_bias_H: Tensor | None,
    parts: tuple[int, int, int, int],
    gated: bool,
    check: Callable[[], None] | None = None,
) -> Parts:
    """See `linear_reference`; float32, float16 or bfloat16. Tensors that are not contiguous are copied first.

    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    # Something stands in for what is not there.
    given = {
        "x_MK": x_MK,
        "weight_NK": weight_NK,
        "bias_N": weight_NK if bias_N is None else bias_N,
        "step_bias_H": weight_NK if step_bias_H is None else step_bias_H,
    }

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x, (M, K) = ready["x_MK"], ready["x_MK"].shape
        arch = architecture(x.device)
        return plan(LinearCall(arch, x.dtype, M, K, parts, gated, bias_N is not None, step_bias_H is not None, exact()))

    key = (parts, gated, *call_key(x_MK, weight_NK, bias_N, step_bias_H))
    made = known_plan(_known, key, given, make, check, lambda _, tensor: not tensor.is_contiguous())
    a_MA, b_MB, c_MC = (x_MK.new_empty((x_MK.shape[0], width)) for width in parts[:3])
    dt_MH = x_MK.new_empty((x_MK.shape[0], parts[3]), dtype=torch.float32)
    run(made, {**given, "a_MA": a_MA, "b_MB": b_MB, "c_MC": c_MC, "dt_MH": dt_MH})
    return a_MA, b_MB, c_MC, dt_MH
