"""WmExpertMix: the sum of a token's picked one-neuron experts.

    y = sum_e act(x · down_e) weight_e up_e        (weight_inside: act(weight_e (x · down_e)) up_e)

Letters: B batch, T tokens, M = B·T, D model width, R retrieval heads, k picks, A = R·k, E experts.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmExpertMix"
INPUTS = [("x_BTD", FLOAT_T), ("expert_BTRk", INT64), ("weight_BTRk", FLOAT_T), ("down_ED", FLOAT_T), ("up_ED", FLOAT_T)]
OUTPUTS = [("y_BTD", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"activation": str, "weight_inside": int, "num_picks": int, "width": int})

# The onnxruntime body takes this many tokens at a time, so that the gathered rows stay in cache.
_CHUNK = 16


def translation(x_BTD: Any, expert_BTRk: Any, weight_BTRk: Any, down_ED: Any, up_ED: Any, activation: str, weight_inside: bool) -> Any:
    """torch.ops.wm.expert_mix to its node."""
    picks = size(expert_BTRk, 2) * size(expert_BTRk, 3)
    return _node(
        x_BTD,
        expert_BTRk,
        weight_BTRk,
        down_ED,
        up_ED,
        activation=activation,
        weight_inside=int(weight_inside),
        num_picks=picks,
        width=size(down_ED, 1),
    )


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one activation and one A."""
    A, D = one["num_picks"], one["width"]
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED = g.all_inputs()
    x_M1D = g.reshape(g.f32(x_BTD), -1, 1, D)
    expert_MA = g.reshape(expert_BTRk, -1, A)
    weight_M1A = g.reshape(g.f32(weight_BTRk), -1, 1, A)

    def mix(x_M1D: Value, expert_MA: Value, weight_M1A: Value) -> Value:
        return _mix(g, one, x_M1D, expert_MA, weight_M1A, down_ED, up_ED)

    y_M1D = _chunked(g, mix, x_M1D, expert_MA, weight_M1A) if g.ort else mix(x_M1D, expert_MA, weight_M1A)
    y_BTD = g.Reshape(y_M1D, g.Shape(x_BTD))
    return g.function({"y_BTD": g.narrow(y_BTD)})


def _mix(g: Body, one: dict[str, Any], x_M1D: Value, expert_MA: Value, weight_M1A: Value, down_ED: Value, up_ED: Value) -> Value:
    down_MAD = g.f32(g.Gather(down_ED, expert_MA))
    hidden_M1A = x_M1D @ g.transpose(down_MAD, 0, 2, 1)
    if one["weight_inside"]:
        hidden_M1A = activate(g, one["activation"], hidden_M1A * weight_M1A)
    else:
        hidden_M1A = activate(g, one["activation"], hidden_M1A) * weight_M1A
    return hidden_M1A @ g.f32(g.Gather(up_ED, expert_MA))


def activate(g: Body, activation: str, h: Value) -> Value:
    """The activation of that name."""
    if activation == "silu":
        return h * g.Sigmoid(h)
    if activation == "gelu":
        # By its formula: onnx's evaluator has no Gelu, and onnxruntime fuses this into one.
        return h * (g.Erf(h * 2**-0.5) + 1.0) * 0.5
    raise ValueError(f"no body for activation {activation!r}")


def _chunked(g: Body, mix: Any, x_M1D: Value, expert_MA: Value, weight_M1A: Value) -> Value:
    M = g.dim(x_M1D, 0)
    direct = g.Squeeze(M, [0]) <= _CHUNK

    def chunks() -> list[Value]:
        # Whole chunks from the front; the last one is moved back to end at M, and its overlap is cut below.
        last = M - _CHUNK

        def step(i: Value) -> Value:
            start = g.Min(g.unsqueeze(i * _CHUNK, 0), last)
            return mix(*(g.slice(v, start, start + _CHUNK, 0) for v in (x_M1D, expert_MA, weight_M1A)))

        count = g.Squeeze((M + (_CHUNK - 1)) / _CHUNK, [0])
        y_CL1D = g.each(count, FLOAT, step)
        whole = (M / _CHUNK) * _CHUNK
        y_M1D = g.reshape(y_CL1D, -1, 1, g.dim(x_M1D, 2))
        end = g.dim(y_M1D, 0)
        return [g.Concat(g.slice(y_M1D, 0, whole, 0), g.slice(y_M1D, end - (M - whole), end, 0), axis=0)]

    (y_M1D,) = g.branch(direct, (FLOAT,), lambda: [mix(x_M1D, expert_MA, weight_M1A)], chunks)
    return y_M1D
