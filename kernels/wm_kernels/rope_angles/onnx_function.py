"""WmRopeAngles: cos and sin of position * frequency, exact to position 2^24 in float32.

Frequencies that no input changes: the position is split into three base-256 digits; each digit's angle comes from a table made in float64,
and

    cos(a + b) = cos a cos b - sin a sin b        sin(a + b) = sin a cos b + cos a sin b

adds them. Dynamic scaling, whose frequencies follow each row's length, computes in float64. Letters: B batch, T tokens, F rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Ref, Value
from wm_kernels.onnx_schema import FLOAT32, INT64, wm_op
from wm_kernels.rope_angles.definition import scaled_frequencies

OP_TYPE = "WmRopeAngles"
INPUTS = [("position_BT", INT64), ("length_B", INT64)]
OUTPUTS = [("cos_BTF", FLOAT32), ("sin_BTF", FLOAT32)]
# An attribute of type float would round, and at position 2^24 that is seen: the numbers of a scaling, and a theta that is no float32, are
# written out in decimal. Attributes that say nothing are left out.
_SCALING = {"scaling": str, "factor": str, "original": int, "low": str, "high": str}
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"pairs": int, "theta": float, "exact_theta": str} | _SCALING, optional=("length_B",))

_BASE = 256
_DOUBLE = int(TensorProto.DOUBLE)


def translation(
    position_BT: Any,
    pairs: int,
    theta: float,
    double: bool = False,
    length_B: Any = None,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 1,
    low: float = 1.0,
    high: float = 4.0,
) -> Any:
    """torch.ops.wm.rope_angles to its node; no file is float64, so `double` does not matter."""
    inputs = (position_BT, length_B) if scaling == "dynamic" else (position_BT,)
    return _node(*inputs, **attributes_of(pairs, theta, scaling, factor, original, low, high))


def attributes_of(pairs: int, theta: float, scaling: str, factor: float, original: int, low: float, high: float) -> dict[str, Any]:
    """What the node says of a call."""
    attributes: dict[str, Any] = {"pairs": pairs, "theta": theta}
    if float(np.float32(theta)) != theta:
        attributes["exact_theta"] = repr(float(theta))
    if scaling != "none":
        attributes |= {"scaling": scaling, "original": original}
        attributes |= {name: repr(float(value)) for name, value in (("factor", factor), ("low", low), ("high", high))}
    return attributes


def share_tables(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes of a model, each with the `tables`, (pairs, theta), of all that differ from it in nothing else.

    One body holds them all: bodies of their own would be overloads, in every model with two rotated widths, and not every reader of ONNX
    files knows those.
    """

    def rest(node: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in node.items() if name not in ("pairs", "theta")}

    return [one | {"tables": sorted({(v["pairs"], v["theta"]) for v in nodes if rest(v) == rest(one)})} for one in nodes]


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one scaling and one exact theta; the calling node's pairs and theta tell which of the tables is its own."""
    # Only dynamic scaling has the second input.
    g = Body(OP_TYPE, [name for name, _ in INPUTS[: 2 if one.get("scaling") == "dynamic" else 1]], FLOAT, flavour)
    cos, sin = _one_of(g, one["tables"], one)
    return g.function({"cos_BTF": cos, "sin_BTF": sin})


def _one_of(g: Body, tables: list[tuple[int, float]], one: dict[str, Any]) -> Sequence[Value]:
    (pairs, theta), *rest = tables
    if not rest:
        return _angles(g, pairs, theta, one)
    # The condition is a constant of the calling node: a runtime that folds constants keeps one branch.
    same_pairs = g.Equal(g.node("Constant", value_int=Ref("pairs", onnx.AttributeProto.INT)), pairs)
    same_theta = g.Equal(g.node("Constant", value_float=Ref("theta", onnx.AttributeProto.FLOAT)), theta)
    return g.branch(same_pairs & same_theta, (FLOAT, FLOAT), lambda: _angles(g, pairs, theta, one), lambda: _one_of(g, rest, one))


def _angles(g: Body, pairs: int, theta: float, one: dict[str, Any]) -> tuple[Value, Value]:
    position_BT, *length = g.all_inputs()
    frequency_F = float(one.get("exact_theta", theta)) ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if "scaling" in one:
        factor, low, high = (float(one[name]) for name in ("factor", "low", "high"))
        scaled_F = scaled_frequencies(torch.from_numpy(frequency_F), one["scaling"], factor, one["original"], low, high)
        frequency_F = scaled_F.numpy()
    if length:
        return _from_lengths(g, position_BT, length[0], frequency_F, float(one["factor"]), one["original"])
    return _from_tables(g, position_BT, frequency_F)


def _from_tables(g: Body, position_BT: Value, frequency_F: Any) -> tuple[Value, Value]:
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


def _from_lengths(g: Body, position_BT: Value, length_B: Value, frequency_F: Any, factor: float, original: int) -> tuple[Value, Value]:
    pairs = len(frequency_F)
    beyond_B = g.Cast(g.Max(length_B, original) - original, to=_DOUBLE)
    ratio_B = beyond_B * np.asarray(factor / original) + np.asarray(1.0)
    stretch_B1F = g.Pow(g.unsqueeze(ratio_B, 1, 2), -np.arange(pairs, dtype=np.float64) / max(pairs - 1, 1))
    angle_BTF = g.unsqueeze(g.Cast(position_BT, to=_DOUBLE), 2) * (stretch_B1F * frequency_F)
    return g.to_f32(g.Cos(angle_BTF)), g.to_f32(g.Sin(angle_BTF))
