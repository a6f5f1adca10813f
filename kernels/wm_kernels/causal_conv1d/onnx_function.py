"""WmCausalConv1d: each channel filtered over its last L inputs, the Y = L - 1 before the call from the state.

    y_t = act(bias + sum_l weight_l x_(t - Y + l))        next = the Y inputs up to token valid - 1

A sum of L shifted products, in both flavours: on onnxruntime's CPU com.microsoft CausalConvWithState takes 1.3 times as long for one
token and twice as long for 512 (C = 1792, L = 4).

Letters: B batch, T tokens, C channels, L taps, Y = L - 1, S = Y + T.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour, Ref, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmCausalConv1d"
INPUTS = [("x_BTC", FLOAT_T), ("weight_CL", FLOAT_T), ("bias_C", FLOAT_T), ("state_BYC", FLOAT32), ("valid_B", INT64)]
OUTPUTS = [("y_BTC", FLOAT_T), ("next_BYC", FLOAT32)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"activation": str, "channels": int, "taps": int}, optional=["bias_C"])


BLOCK = 16  # channels that onnxruntime's convolutions take together, on processors with AVX-512; 8 elsewhere


def translation(x_BTC: Any, weight_CL: Any, bias_C: Any, state_BYC: Any, valid_B: Any, activation: str) -> Any:
    """torch.ops.wm.causal_conv1d to its node."""
    return _node(x_BTC, weight_CL, bias_C, state_BYC, valid_B, activation=activation, channels=size(weight_CL, 0), taps=size(weight_CL, 1))


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one activation and one L; in blocks, the channels are read from the calling node."""
    L = one["taps"]
    in_blocks = flavour == "ort" and one["channels"] % BLOCK == 0
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTC, weight_CL, bias_C, state_BYC, valid_B = g.all_inputs()
    wide_BTC, wide_CL = g.f32(x_BTC), g.f32(weight_CL)
    bias = None if "bias_C" in one["absent"] else g.f32(bias_C)
    if L == 1:
        # An empty state: tensors without elements are kept out of the arithmetic.
        y_BTC, next_BYC = _add(wide_BTC * g.transpose(wide_CL, 1, 0), bias), g.Identity(state_BYC)
    else:
        x_BSC = g.Concat(state_BYC, wide_BTC, axis=1)
        y_BTC = _convolve(g, x_BSC, wide_CL, bias) if in_blocks else _add(_filter(g, x_BSC, wide_CL, L), bias)
        index_BY = g.unsqueeze(valid_B, 1) + list(range(L - 1))
        next_BYC = g.GatherND(x_BSC, g.unsqueeze(index_BY, 2), batch_dims=1)
    return g.function({"y_BTC": g.narrow(_activate(g, one["activation"], y_BTC)), "next_BYC": next_BYC})


def _add(y_BTC: Value, bias_C: Value | None) -> Value:
    return y_BTC if bias_C is None else y_BTC + bias_C


def _convolve(g: Body, x_BSC: Value, weight_CL: Value, bias_C: Value | None) -> Value:
    """Conv over an image of one row. onnxruntime joins the transposes with its reordering of the channels into blocks."""
    x_BC1S = g.transpose(g.unsqueeze(x_BSC, 1), 0, 3, 1, 2)
    y_BC1T = g.Conv(x_BC1S, g.unsqueeze(weight_CL, 1, 2), bias_C, group=Ref("channels", onnx.AttributeProto.INT))
    return g.Squeeze(g.transpose(y_BC1T, 0, 2, 3, 1), [1])


def _filter(g: Body, x_BSC: Value, weight_CL: Value, L: int) -> Value:
    taps_1C = g.Split(g.transpose(weight_CL, 1, 0), [1] * L, axis=0, outs=L)
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
