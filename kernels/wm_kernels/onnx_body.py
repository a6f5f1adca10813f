"""A small builder for ONNX function bodies: Python operators write nodes, names are numbered, two builds give equal bytes.

    g = Body("WmRope", ["x_BTHP", "cos_BTF", "sin_BTF"], dtype=FLOAT, flavour="portable")
    y = g.f32(g.input("x_BTHP")) * 2.0
    function = g.function({"y_BTHP": y})

A Python int is an int64 scalar, a float a float32 scalar, a list or tuple a 1-D int64 tensor; `g.AnyOp(...)` is a node of that op type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "wm"
OPSET = 23
MICROSOFT = "com.microsoft"
FLOAT = int(TensorProto.FLOAT)
FLOAT16 = int(TensorProto.FLOAT16)
BFLOAT16 = int(TensorProto.BFLOAT16)
DOUBLE = int(TensorProto.DOUBLE)
INT32 = int(TensorProto.INT32)
INT64 = int(TensorProto.INT64)
BOOL = int(TensorProto.BOOL)
UINT8 = int(TensorProto.UINT8)

Flavour = Literal["portable", "ort"]


@dataclass(frozen=True)
class Ref:
    """An attribute of a body's node that is read from the calling node's attribute `name`."""

    name: str
    type: int


@dataclass(frozen=True, eq=False)
class Value:
    """The name of a tensor in a body; operators append nodes to the body."""

    body: Body
    name: str

    def __add__(self, other: Any) -> Value:
        return self.body.node("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.body.node("Add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.body.node("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.body.node("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.body.node("Mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.body.node("Mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.body.node("Div", self, other)

    def __matmul__(self, other: Any) -> Value:
        return self.body.node("MatMul", self, other)

    def __lt__(self, other: Any) -> Value:
        return self.body.node("Less", self, other)

    def __le__(self, other: Any) -> Value:
        return self.body.node("LessOrEqual", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.body.node("Greater", self, other)

    def __ge__(self, other: Any) -> Value:
        return self.body.node("GreaterOrEqual", self, other)

    def __and__(self, other: Any) -> Value:
        return self.body.node("And", self, other)

    def __or__(self, other: Any) -> Value:
        return self.body.node("Or", self, other)

    def __neg__(self) -> Value:
        return self.body.node("Neg", self)


@dataclass
class _Scope:
    """The nodes of one graph (the body, or one branch of an If) and the constants already made in it."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[tuple[Any, ...], Value] = field(default_factory=dict)


class Body:
    """The function of one op type: inputs by name, nodes in the order in which they are written."""

    def __init__(self, op_type: str, inputs: Sequence[str], dtype: int, flavour: Flavour) -> None:
        self.op_type = op_type
        self.dtype = dtype
        self.flavour = flavour
        self.inputs = list(inputs)
        self._scopes = [_Scope()]
        self._count: dict[str, int] = {}

    @property
    def ort(self) -> bool:
        """True when com.microsoft ops may be used."""
        return self.flavour == "ort"

    def all_inputs(self) -> tuple[Value, ...]:
        """The inputs, in order."""
        return tuple(Value(self, name) for name in self.inputs)

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.node(op_type, *inputs, **attributes)

    def node(self, op_type: str, *inputs: Any, outs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Append a node; return its output, or a tuple of `outs` outputs."""
        name = self._name(op_type)
        outputs = [name] if outs == 1 else [f"{name}_{i}" for i in range(outs)]
        node = helper.make_node(op_type, [self._operand(x) for x in inputs], outputs, name=name, domain=domain)
        for key in sorted(attributes):
            value = attributes[key]
            if isinstance(value, Ref):
                node.attribute.append(onnx.AttributeProto(name=key, ref_attr_name=value.name, type=value.type))  # type: ignore[arg-type]
            else:
                node.attribute.append(helper.make_attribute(key, value))
        self._scopes[-1].nodes.append(node)
        values = tuple(Value(self, output) for output in outputs)
        return values[0] if outs == 1 else values

    def microsoft(self, op_type: str, *inputs: Any, outs: int = 1, **attributes: Any) -> Any:
        """Append a com.microsoft node."""
        return self.node(op_type, *inputs, outs=outs, domain=MICROSOFT, **attributes)

    def branch(
        self, condition: Value, types: Sequence[int], then: Callable[[], Sequence[Value]], other: Callable[[], Sequence[Value]]
    ) -> tuple[Value, ...]:
        """An If node: the values of `then()` where the condition holds, else those of `other()`; `types` are their element types."""
        name = self._name("If")
        graphs = {
            "then_branch": self._subgraph(f"{name}_then", [], then, types),
            "else_branch": self._subgraph(f"{name}_else", [], other, types),
        }
        result = self.node("If", condition, outs=len(types), **graphs)
        return (result,) if len(types) == 1 else result

    def each(self, count: Value, types: int, step: Callable[[Value], Value]) -> Value:
        """A Loop node without carried values: step(i) for i < count, stacked on a new axis 0."""
        name = self._name("Loop")
        index, keep = f"{name}_i", f"{name}_keep"

        def run() -> list[Value]:
            return [self.node("Identity", Value(self, keep)), step(Value(self, index))]

        inputs = [helper.make_tensor_value_info(index, INT64, []), helper.make_tensor_value_info(keep, TensorProto.BOOL, [])]
        graph = self._subgraph(f"{name}_body", inputs, run, [int(TensorProto.BOOL), types])
        return self.node("Loop", count, None, body=graph)

    def scan(
        self, state: Value, rows: Sequence[Value], types: int, step: Callable[[Value, Sequence[Value]], tuple[Value, Value]]
    ) -> tuple[Value, Value]:
        """A Scan node over axis 0 of `rows`: (state, out) = step(state, one of each); the last state, and the outs on a new axis 0.

        `types` is the element type of the state, the rows and the outs.
        """
        name = self._name("Scan")
        inner = [Value(self, f"{name}_state"), *(Value(self, f"{name}_row_{i}") for i in range(len(rows)))]
        inputs = [helper.make_tensor_value_info(value.name, types, None) for value in inner]
        graph = self._subgraph(f"{name}_body", inputs, lambda: step(inner[0], inner[1:]), [types, types])
        last, outs = self.node("Scan", state, *rows, outs=2, body=graph, num_scan_inputs=len(rows))
        return last, outs

    def scan_all(
        self, states: Sequence[Value], rows: Sequence[Value], types: Sequence[int], step: Callable[..., Sequence[Value]]
    ) -> tuple[Value, ...]:
        """A Scan node over axis 0 of `rows` that makes nothing but its last states: states = step(*states, *one of each).

        `types` are the element types of the states, then of the rows. onnxruntime reads one of each without a copy.
        """
        name = self._name("Scan")
        inner = [Value(self, f"{name}_in_{i}") for i in range(len(types))]
        inputs = [onnx.ValueInfoProto(name=v.name, type=helper.make_tensor_type_proto(t, None)) for v, t in zip(inner, types, strict=True)]
        graph = self._subgraph(f"{name}_body", inputs, lambda: step(*inner), types[: len(states)])
        result: tuple[Value, ...] = self.node("Scan", *states, *rows, outs=len(states), body=graph, num_scan_inputs=len(rows))
        return result

    def _subgraph(
        self, name: str, inputs: list[onnx.ValueInfoProto], make: Callable[[], Sequence[Value]], types: Sequence[int]
    ) -> onnx.GraphProto:
        self._scopes.append(_Scope())
        outputs = list(make())
        made = {output for node in self._scopes[-1].nodes for output in node.output}
        # A branch must output a value of its own, never one of the graph around it.
        outputs = [v if v.name in made else self.node("Identity", v) for v in outputs]
        nodes = self._scopes.pop().nodes
        infos = []
        for value, elem in zip(outputs, types, strict=True):
            # Only the element type: com.microsoft ops infer nothing, and both branches of an If must agree.
            infos.append(onnx.ValueInfoProto(name=value.name, type=helper.make_tensor_type_proto(elem, None)))
        return helper.make_graph(nodes, name, inputs, infos)

    def _name(self, op_type: str) -> str:
        number = self._count.get(op_type, 0)
        self._count[op_type] = number + 1
        return f"{op_type}_{number}"

    def _operand(self, x: Any) -> str:
        if x is None:
            return ""
        return x.name if isinstance(x, Value) else self.constant(x).name

    def constant(self, x: Any) -> Value:
        """A Constant node; equal constants of one scope are made once."""
        if isinstance(x, bool):
            x = np.asarray(x)
        elif isinstance(x, int):
            x = np.asarray(x, np.int64)
        elif isinstance(x, float):
            x = np.asarray(x, np.float32)
        elif isinstance(x, list | tuple):
            x = np.asarray(x, np.int64)
        key = (str(x.dtype), x.shape, x.tobytes())
        for scope in self._scopes:
            if key in scope.constants:
                return scope.constants[key]
        value: Value = self.node("Constant", value=numpy_helper.from_array(x, name=""))
        self._scopes[-1].constants[key] = value
        return value

    # Short forms of the nodes that every body needs.

    def f32(self, x: Value) -> Value:
        """The value in float32."""
        return x if self.dtype == FLOAT else self.node("Cast", x, to=FLOAT)

    def narrow(self, x: Value) -> Value:
        """A float32 value in the file's dtype."""
        return x if self.dtype == FLOAT else self.node("Cast", x, to=self.dtype)

    def to_f32(self, x: Value) -> Value:
        """Integers or booleans as float32."""
        return self.node("Cast", x, to=FLOAT)

    def int64(self, x: Value) -> Value:
        """The value as int64."""
        return self.node("Cast", x, to=INT64)

    def dim(self, x: Value, axis: int) -> Value:
        """One dimension of x, a 1-D tensor of one element."""
        return self.node("Shape", x, start=axis, end=axis + 1)

    def shape(self, *parts: Value | int) -> Value:
        """A shape from 1-D pieces and integers."""
        return self.node("Concat", *[p if isinstance(p, Value) else [p] for p in parts], axis=0)

    def reshape(self, x: Value, *parts: Value | int) -> Value:
        """Reshape; 0 copies a dimension, -1 is what remains."""
        if all(isinstance(p, int) for p in parts):
            return self.node("Reshape", x, parts)
        return self.node("Reshape", x, self.shape(*parts))

    def expand(self, x: Value, *parts: Value | int) -> Value:
        """Broadcast to a shape."""
        return self.node("Expand", x, self.shape(*parts))

    def transpose(self, x: Value, *perm: int) -> Value:
        """Permute the axes."""
        return self.node("Transpose", x, perm=list(perm))

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        """Insert axes of size 1."""
        return self.node("Unsqueeze", x, axes)

    def slice(self, x: Value, start: Any, end: Any, axis: int) -> Value:
        """x[start:end] on one axis; ends are ints or 1-D values."""
        start, end = ([e] if isinstance(e, int) else e for e in (start, end))
        return self.node("Slice", x, start, end, [axis])

    def arange(self, n: Value) -> Value:
        """0 .. n-1 for a 1-D n of one element."""
        return self.node("Range", 0, self.node("Squeeze", n, [0]), 1)

    def pick(self, x: Value, index: Value) -> Value:
        """x[.., index[.., m]] on the last axis of a 3- or 4-D value; all other axes of x and index are equal."""
        if self.ort:
            return self.node("GatherElements", x, index, axis=-1)
        # A flat Gather: onnx's own evaluator has GatherElements only for axes of up to 64 elements.
        lead, width = self.node("Shape", x, end=-1), self.node("Shape", x, start=-1)
        rows = self.arange(self.node("ReduceProd", lead, keepdims=1)) * width
        start = self.node("Reshape", rows, self.node("Concat", lead, [1], axis=0))
        return self.node("Gather", self.reshape(x, -1), index + start)

    def function(self, outputs: dict[str, Value]) -> onnx.FunctionProto:
        """The finished function, its outputs under the given names, in order."""
        names = {value.name: name for name, value in outputs.items()}
        nodes = self._scopes[0].nodes
        for node in nodes:
            _rename(node, names)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(_uses_microsoft(node) for node in nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        attributes = sorted({a for node in nodes for a in _references(node)})
        return helper.make_function(DOMAIN, self.op_type, self.inputs, list(outputs), nodes, opsets, attributes)


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in _graphs(node):
        for inner in graph.node:
            _rename(inner, names)
        for info in graph.output:
            info.name = names.get(info.name, info.name)


def _uses_microsoft(node: onnx.NodeProto) -> bool:
    return node.domain == MICROSOFT or any(_uses_microsoft(inner) for graph in _graphs(node) for inner in graph.node)


def _references(node: onnx.NodeProto) -> set[str]:
    found = {a.ref_attr_name for a in node.attribute if a.ref_attr_name}
    for graph in _graphs(node):
        for inner in graph.node:
            found |= _references(inner)
    return found
