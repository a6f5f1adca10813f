"""WmGatedRmsNorm: the root-mean-square norm of a gated value.

    gated = y * z * sigmoid(z)        out = weight * gated / sqrt(mean(gated^2) + eps)

com.microsoft GatedRMSNorm is another function: it normalises first and gates after.

Letters: M = B·T, C channels.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Ref
from wm_kernels.onnx_schema import FLOAT_T, wm_op

OP_TYPE = "WmGatedRmsNorm"
INPUTS = [("y_MC", FLOAT_T), ("z_MC", FLOAT_T), ("weight_C", FLOAT_T)]
OUTPUTS = [("out_MC", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"eps": float})


def translation(y_MC: Any, z_MC: Any, weight_C: Any, eps: float) -> Any:
    """torch.ops.wm.gated_rms_norm to its node."""
    return _node(y_MC, z_MC, weight_C, eps=eps)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function; eps is read from the calling node."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    y_MC, z_MC, weight_C = g.all_inputs()
    wide_MC = g.f32(z_MC)
    gated_MC = g.f32(y_MC) * (wide_MC * g.Sigmoid(wide_MC))
    eps = Ref("eps", onnx.AttributeProto.FLOAT)
    if g.dtype == FLOAT:
        out_MC = g.RMSNormalization(gated_MC, weight_C, axis=-1, epsilon=eps)
    else:
        # RMSNormalization would have the gated value rounded; only the unit vector is, before the weight.
        mean_M1 = g.ReduceMean(gated_MC * gated_MC, [-1], keepdims=1)
        unit_MC = gated_MC / g.Sqrt(mean_M1 + g.Constant(value_float=eps))
        out_MC = g.narrow(unit_MC) * weight_C
    return g.function({"out_MC": out_MC})
