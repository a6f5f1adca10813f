"""Schemas of the Wm nodes, kept locally: nothing is registered in the process, so importing this changes no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxscript
from onnx.defs import OpSchema

from wm_kernels.onnx_body import DOMAIN

FLOAT_T = "T"
FLOAT32 = "tensor(float)"
INT64 = "tensor(int64)"

_ATTRIBUTE_TYPES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING}


def wm_op(
    name: str,
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    attributes: Mapping[str, type] | None = None,
    optional: Sequence[str] = (),
) -> Any:
    """A callable that writes the node `wm::name` during export; inputs and outputs are (name, type) pairs, type "T" is the file's dtype."""
    option = OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(n, t, param_option=option.Optional if n in optional else option.Single) for n, t in inputs],
        outputs=[OpSchema.FormalParameter(n, t) for n, t in outputs],
        type_constraints=[(FLOAT_T, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[OpSchema.Attribute(n, _ATTRIBUTE_TYPES[t], "") for n, t in (attributes or {}).items()],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


def size(value: Any, axis: int) -> int:
    """A static dimension of a value of the graph being exported."""
    dim = value.shape[axis]
    if not isinstance(dim, int):
        raise ValueError(f"axis {axis} of {value.name} must be static, got {dim}; mark it static in dynamic_shapes")
    return dim
