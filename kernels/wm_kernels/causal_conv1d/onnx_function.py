"""WmCausalConv1d: each channel filtered over its last L inputs, the Y = L - 1 before the call from the state.

    y_t = act(bias + sum_l weight_l x_(t - Y + l))        next = the Y inputs up to token valid - 1

A sum of L shifted products, in both flavours: on onnxruntime's CPU com.microsoft CausalConvWithState takes 1.3 times as long for one
token and twice as long for 512 (C = 1792, L = 4).

Letters: B batch, T tokens, C channels, L taps, Y = L - 1, S = Y + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour, Value, single
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmCausalConv1d"
INPUTS = [("x_BTC", FLOAT_T), ("weight_CL", FLOAT_T), ("bias_C", FLOAT_T), ("state_BCY", FLOAT32), ("valid_B", INT64)]
OUTPUTS = [("y_BTC", FLOAT_T), ("next_BCY", FLOAT32)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"activation": str, "taps": int}, optional=["bias_C"])


def translation(x_BTC: Any, weight_CL: Any, bias_C: Any, state_BCY: Any, valid_B: Any, activation: str) -> Any:
    """torch.ops.wm.causal_conv1d to its node."""
    return _node(x_BTC, weight_CL, bias_C, state_BCY, valid_B, activation=activation, taps=size(weight_CL, 1))


def body(flavour: Flavour, variants: Sequence[dict[str, Any]]) -> onnx.FunctionProto:
    """The function, for one activation and one L; convolutions of one model may differ in channels."""
    one = single(OP_TYPE, variants)
    L = one["taps"]
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTC, weight_CL, bias_C, state_BCY, valid_B = g.all_inputs()
    wide_BTC, weight_LC = g.f32(x_BTC), g.transpose(g.f32(weight_CL), 1, 0)
    if L == 1:
        # An empty state: tensors without elements are kept out of the arithmetic.
        y_BTC, next_BCY = wide_BTC * weight_LC, g.Identity(state_BCY)
    else:
        x_BSC = g.Concat(g.transpose(state_BCY, 0, 2, 1), wide_BTC, axis=1)
        y_BTC = _filter(g, x_BSC, weight_LC, L)
        index_BY = g.unsqueeze(valid_B, 1) + list(range(L - 1))
        next_BCY = g.transpose(g.GatherND(x_BSC, g.unsqueeze(index_BY, 2), batch_dims=1), 0, 2, 1)
    if "bias_C" not in one["absent"]:
        y_BTC = y_BTC + g.f32(bias_C)
    return g.function({"y_BTC": g.narrow(_activate(g, one["activation"], y_BTC)), "next_BCY": next_BCY})


def _filter(g: Body, x_BSC: Value, weight_LC: Value, L: int) -> Value:
    taps_1C = g.Split(weight_LC, [1] * L, axis=0, outs=L)
    total_BTC = g.slice(x_BSC, 0, 1 - L, 1) * taps_1C[0]
    for tap in range(1, L):
        # Ends counted from the back are constants, whatever T is.
        total_BTC = total_BTC + g.slice(x_BSC, tap, tap + 1 - L or 2**62, 1) * taps_1C[tap]
    return total_BTC


def _activate(g: Body, activation: str, y: Value) -> Value:
    if activation == "none":
        return y
    if activation == "silu":
        return y * g.Sigmoid(y)
    raise ValueError(f"WmCausalConv1d has no body for activation {activation!r}")
