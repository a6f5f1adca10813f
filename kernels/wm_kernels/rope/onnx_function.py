"""WmRope: rotate the first 2F of P features, half-split.

    y_lo = x_lo cos - x_hi sin        y_hi = x_hi cos + x_lo sin        the rest passes through

Letters: B batch, T tokens, H heads, P head dim, F rotated pairs.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour, Ref, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, size, wm_op

OP_TYPE = "WmRope"
INPUTS = [("x_BTHP", FLOAT_T), ("cos_BTF", FLOAT32), ("sin_BTF", FLOAT32)]
OUTPUTS = [("y_BTHP", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"head_dim": int, "num_heads": int, "pairs": int})


def translation(x_BTHP: Any, cos_BTF: Any, sin_BTF: Any) -> Any:
    """torch.ops.wm.rope to its node."""
    return _node(x_BTHP, cos_BTF, sin_BTF, head_dim=size(x_BTHP, 3), num_heads=size(x_BTHP, 2), pairs=size(cos_BTF, 2))


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (P, F); the heads are read from the calling node."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTHP, cos_BTF, sin_BTF = g.all_inputs()
    heads = Ref("num_heads", onnx.AttributeProto.INT)
    y_BTHP = rotate(g, g.f32(x_BTHP), cos_BTF, sin_BTF, heads, one["head_dim"], one["pairs"])
    return g.function({"y_BTHP": g.narrow(y_BTHP)})


def rotate(g: Body, x_BTHP: Value, cos_BTF: Value, sin_BTF: Value, heads: int | Ref, head_dim: int, pairs: int) -> Value:
    """The rotation of a float32 value, also used by WmSsdScanRope."""
    if g.ort:
        x_BTE = g.reshape(x_BTHP, 0, 0, -1)
        y_BTE = g.RotaryEmbedding(x_BTE, cos_BTF, sin_BTF, num_heads=heads, rotary_embedding_dim=2 * pairs)
        return g.reshape(y_BTE, 0, 0, -1, head_dim)
    cos_BT1F, sin_BT1F = g.unsqueeze(cos_BTF, 2), g.unsqueeze(sin_BTF, 2)
    sizes = [pairs, pairs, head_dim - 2 * pairs] if head_dim > 2 * pairs else [pairs, pairs]
    low, high, *rest = g.Split(x_BTHP, sizes, axis=-1, outs=len(sizes))
    return g.Concat(low * cos_BT1F - high * sin_BT1F, high * cos_BT1F + low * sin_BT1F, *rest, axis=-1)
