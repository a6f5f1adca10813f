"""WmLinear: a linear layer whose outputs leave in parts, as step sizes, or gated.

    y = x W^T + bias        a, b, c = parts of y        dt = softplus(last part + step_bias)
    gated: a = SiLU(first half of y) * second half

Letters: M = B·T, K inputs, N outputs before gates, A, B, C, H widths of the parts.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, wm_op

OP_TYPE = "WmLinear"
INPUTS = [("x_MK", FLOAT_T), ("weight_NK", FLOAT_T), ("bias_N", FLOAT_T), ("step_bias_H", FLOAT_T)]
OUTPUTS = [("a_MA", FLOAT_T), ("b_MB", FLOAT_T), ("c_MC", FLOAT_T), ("dt_MH", FLOAT32)]
WIDTHS = ("A", "B", "C", "H")
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, dict.fromkeys((*WIDTHS, "gated"), int), optional=["bias_N", "step_bias_H"])


def translation(x_MK: Any, weight_NK: Any, bias_N: Any, step_bias_H: Any, A: int, B: int, C: int, H: int, gated: bool) -> Any:
    """torch.ops.wm.linear to its node."""
    return _node(x_MK, weight_NK, bias_N, step_bias_H, A=A, B=B, C=C, H=H, gated=int(gated))


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for the widths of one node."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_MK, weight_NK, bias_N, step_bias_H = g.all_inputs()
    y_MN = g.Gemm(x_MK, weight_NK, None if "bias_N" in one["absent"] else bias_N, transB=1)
    if one["gated"]:
        gate_MA, up_MA = (g.f32(half) for half in g.Split(y_MN, outs=2, axis=1, num_outputs=2))
        y_MN = g.narrow(gate_MA * g.Sigmoid(gate_MA) * up_MA)
    parts = _parts(g, y_MN, [one[name] for name in WIDTHS])
    dt_MH = g.f32(parts.pop())
    if "step_bias_H" not in one["absent"]:
        dt_MH = dt_MH + g.f32(step_bias_H)
    dt_MH = g.Where(dt_MH > 20.0, dt_MH, g.Softplus(dt_MH))  # some runtimes' Softplus overflows
    return g.function({"a_MA": parts[0], "b_MB": parts[1], "c_MC": parts[2], "dt_MH": dt_MH})


def _parts(g: Body, y_MN: Value, widths: list[int]) -> list[Value]:
    """y in parts of these widths, some of which may be 0: no columns are gathered, as CUDA has no Slice of bfloat16."""
    wide = [width for width in widths if width]
    found = iter([g.Identity(y_MN)] if len(wide) == 1 else g.Split(y_MN, wide, outs=len(wide), axis=1))
    return [next(found) if width else g.Gather(y_MN, [], axis=1) for width in widths]
