"""WmRopeAngles: cos and sin of position * theta^(-j/F), exact to position 2^24 in float32.

The position is split into three base-256 digits; each digit's angle comes from a table made in float64, and

    cos(a + b) = cos a cos b - sin a sin b        sin(a + b) = sin a cos b + cos a sin b

adds them. Letters: B batch, T tokens, F rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Ref, Value
from wm_kernels.onnx_schema import FLOAT32, INT64, wm_op

OP_TYPE = "WmRopeAngles"
INPUTS = [("position_BT", INT64)]
OUTPUTS = [("cos_BTF", FLOAT32), ("sin_BTF", FLOAT32)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"pairs": int, "theta": float})

_BASE = 256


def translation(position_BT: Any, pairs: int, theta: float, double: bool = False) -> Any:
    """torch.ops.wm.rope_angles to its node; files are float32 or float16, so `double` does not matter."""
    return _node(position_BT, pairs=pairs, theta=theta)


def body(flavour: Flavour, variants: Sequence[dict[str, Any]]) -> onnx.FunctionProto:
    """The function; it holds the tables of every (pairs, theta) of the model."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], FLOAT, flavour)
    (position_BT,) = g.all_inputs()
    keys = sorted({(int(v["pairs"]), float(np.float32(v["theta"]))) for v in variants})
    cos, sin = _one_of(g, position_BT, keys)
    return g.function({"cos_BTF": cos, "sin_BTF": sin})


def _one_of(g: Body, position_BT: Value, keys: list[tuple[int, float]]) -> Sequence[Value]:
    (pairs, theta), rest = keys[0], keys[1:]
    if not rest:
        return _angles(g, position_BT, pairs, theta)
    # The condition is a constant of the calling node: a runtime that folds constants keeps one branch.
    same_pairs = g.Equal(g.node("Constant", value_int=Ref("pairs", onnx.AttributeProto.INT)), pairs)
    same_theta = g.Equal(g.node("Constant", value_float=Ref("theta", onnx.AttributeProto.FLOAT)), theta)
    return g.branch(
        same_pairs & same_theta, (FLOAT, FLOAT), lambda: _angles(g, position_BT, pairs, theta), lambda: _one_of(g, position_BT, rest)
    )


def _angles(g: Body, position_BT: Value, pairs: int, theta: float) -> tuple[Value, Value]:
    frequency_F = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    total: tuple[Value, Value] | None = None
    for place in (1, _BASE, _BASE * _BASE):
        # The last table has one row more, for position 2^24 itself.
        last = place == _BASE * _BASE
        digit_BT = position_BT if place == 1 else g.Div(position_BT, place)
        if not last:
            digit_BT = g.Mod(digit_BT, _BASE)
        angle_DF = np.outer(np.arange(_BASE + last, dtype=np.float64) * place, frequency_F)
        cos_BTF = g.Gather(g.constant(np.cos(angle_DF).astype(np.float32)), digit_BT)
        sin_BTF = g.Gather(g.constant(np.sin(angle_DF).astype(np.float32)), digit_BT)
        if total is None:
            total = cos_BTF, sin_BTF
        else:
            cos, sin = total
            total = cos * cos_BTF - sin * sin_BTF, sin * cos_BTF + cos * sin_BTF
    assert total is not None
    return total
