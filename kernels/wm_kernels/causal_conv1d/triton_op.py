"""`causal_conv1d` by a Triton kernel. B batch, T tokens, C channels, L taps, Y = L - 1."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from wm_kernels.causal_conv1d.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run, strides

NAMES = ("x_BTC", "weight_CL", "bias_C", "valid_B", "before_BYC", "after_BYC")

_known: dict[tuple[object, ...], Known] = {}


def causal_conv1d_triton(
    x_BTC: Tensor,
    weight_CL: Tensor,
    bias_C: Tensor | None,
    state_BYC: Tensor | None,
    valid_B: Tensor | None,
    activation: str,
    after_BYC: Tensor | None = None,
    check: Callable[[], None] | None = None,
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
        check: raises where arguments are wrong; called unless a call of the same shapes and dtypes has passed it.

    Returns:
        (y_BTC, the new state).
    """
    tensors = (x_BTC, weight_CL, bias_C, valid_B, state_BYC, after_BYC)
    given = {name: value for name, value in zip(NAMES, tensors, strict=True) if value is not None}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x, weight = ready["x_BTC"], ready["weight_CL"]
        after = ready["after_BYC"] if "after_BYC" in ready else _new_state(x.to("meta"), weight)
        before = ready.get("before_BYC", after)
        states = strides(before)[:2], strides(after)[:2]
        has = bias_C is not None, state_BYC is not None, valid_B is not None
        silu, arch = activation == "silu", architecture(x.device)
        return plan(*x.shape, weight.shape[1], x.dtype, has, silu, strides(x)[:2], weight.stride(0), *states, arch)

    made = known_plan(_known, (activation, *call_key(*tensors)), given, make, check)
    if after_BYC is None:
        given["after_BYC"] = _new_state(x_BTC, weight_CL)
    written = given["after_BYC"]
    # Stand-ins for what is not there, which are never read.
    for name, value in (("bias_C", weight_CL), ("valid_B", x_BTC), ("before_BYC", written)):
        given.setdefault(name, value)
    y_BTC = given["y_BTC"] = x_BTC.new_empty(x_BTC.shape)
    run(made, given)
    if after_BYC is not None and written is not after_BYC:
        after_BYC.copy_(written)
    return y_BTC, written if after_BYC is None else after_BYC


def _new_state(x_BTC: Tensor, weight_CL: Tensor) -> Tensor:
    (B, _, C), L = x_BTC.shape, weight_CL.shape[1]
    return x_BTC.new_empty((B, L - 1, C), dtype=torch.float32)
