"""WmResidualRmsNorm: the residual sum and its root-mean-square norm.

    sum = x + scale * residual        normed = weight * sum / sqrt(mean(sum^2) + eps)

Letters: M = B·T, D model width.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Ref
from wm_kernels.onnx_schema import FLOAT_T, wm_op

OP_TYPE = "WmResidualRmsNorm"
INPUTS = [("x_MD", FLOAT_T), ("residual_MD", FLOAT_T), ("scale_D", FLOAT_T), ("weight_D", FLOAT_T)]
OUTPUTS = [("normed_MD", FLOAT_T), ("sum_MD", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"eps": float}, optional=["scale_D"])


def translation(x_MD: Any, residual_MD: Any, scale_D: Any, weight_D: Any, eps: float) -> Any:
    """torch.ops.wm.residual_rms_norm to its node."""
    return _node(x_MD, residual_MD, scale_D, weight_D, eps=eps)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function; eps is read from the calling node."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_MD, residual_MD, scale_D, weight_D = g.all_inputs()
    scaled_MD = g.f32(residual_MD)
    if "scale_D" not in one["absent"]:
        scaled_MD = scaled_MD * g.f32(scale_D)
    eps = Ref("eps", onnx.AttributeProto.FLOAT)
    if g.ort and g.dtype == FLOAT:
        normed_MD, _, _, sum_MD = g.microsoft("SkipSimplifiedLayerNormalization", x_MD, scaled_MD, weight_D, outs=4, epsilon=eps)
    else:
        # The norm reads the rounded sum, and rounds before the weight: what RMSNormalization does on the file's dtype.
        sum_MD = g.narrow(g.f32(x_MD) + scaled_MD)
        normed_MD = g.RMSNormalization(sum_MD, weight_D, axis=-1, epsilon=eps)
    return g.function({"normed_MD": normed_MD, "sum_MD": sum_MD})
