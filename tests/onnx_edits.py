"""Edits of an ONNX file, written in ONNX's own text: what planted faults are made of. Nodes change, weights stay.

    part.distort("sin_BTF", "y = Neg(x)")        whoever read sin_BTF reads its negative

Every edit raises LookupError where it finds nothing to change, so that a fault never quietly becomes none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from faults import resign

Nodes = Any  # a repeated field of NodeProto
Where = Callable[[onnx.NodeProto], bool]


class Part:
    """The main graph of a file, or the body of an op: nodes, those of nested graphs too."""

    def __init__(self, proto: onnx.GraphProto | onnx.FunctionProto, model: onnx.ModelProto) -> None:
        self.proto = proto
        (self.dtype,) = {item.data_type for item in model.graph.initializer if item.name == "embedding"}

    @property
    def own(self) -> str:
        """The text that rounds a float32 value to the file's dtype: no change in a float32 file."""
        return f"a = Cast <to = {self.dtype}> (x)  y = Cast <to = 1> (a)"

    def find(self, op_type: str, where: Where | None = None) -> list[onnx.NodeProto]:
        """The nodes of one type, in order; LookupError where there are none."""
        found = [node for _, node in self._walk(self.proto.node) if node.op_type == op_type and (where is None or where(node))]
        if not found:
            raise LookupError(f"{self.proto.name}: no {op_type} to change; the graph is no longer what this fault was written for")
        return found

    def value(self, op_type: str, nth: int = 0, output: int = 0) -> str:
        """The name of an output of the nth node of one type."""
        return str(self.find(op_type)[nth].output[output])

    def number(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a constant; None for any other name."""
        for _, node in self._walk(self.proto.node):
            if name in node.output and node.op_type == "Constant" and node.attribute[0].HasField("t"):
                return numpy_helper.to_array(node.attribute[0].t)
        for item in getattr(self.proto, "initializer", ()):
            if item.name == name and not item.external_data:
                return numpy_helper.to_array(item)
        return None

    def reads(self, *numbers: Any) -> Where:
        """Whether a node reads a constant equal to one of the numbers."""
        wanted = [np.asarray(number) for number in numbers]

        def holds(node: onnx.NodeProto) -> bool:
            found = [number for name in node.input if (number := self.number(name)) is not None]
            return any(np.array_equal(number, one) for number in found for one in wanted)

        return holds

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value; LookupError where there are none."""
        found = [node for _, node in self._walk(self.proto.node) if name in node.input]
        if not found:
            raise LookupError(f"{self.proto.name}: nothing reads {name!r}; the graph is no longer what this fault was written for")
        return found

    def distort(self, name: str, text: str, **names: str) -> None:
        """Put `y` of the text in the place of the value, which the text calls `x`; other values go by `names`, or by their own names."""
        makers = [(nodes, index) for nodes, index in self._places() if name in nodes[index].output]
        if makers:
            (nodes, index), before, after = makers[0], f"{name}_right", name
            _rename_outputs(nodes[index], {name: before})
        else:
            nodes, index, before, after = self.proto.node, -1, name, f"{name}_wrong"
            for node in self.readers(name):
                _rename_inputs(node, {name: after})
        for offset, node in enumerate(_parse(text, {"x": before, "y": after} | names, f"{name}/fault")):
            nodes.insert(index + 1 + offset, node)

    def distort_all(self, op_type: str, text: str, where: Where | None = None) -> None:
        """`distort` the first output of every node of one type."""
        for name in [node.output[0] for node in self.find(op_type, where)]:
            self.distort(name, text)

    def feed(self, node: onnx.NodeProto, index: int, text: str, **names: str) -> None:
        """Put `y` of the text in the place of one input of one node, which the text calls `x`."""
        nodes, place = next((nodes, place) for nodes, place in self._places() if nodes[place].output == node.output)
        wrong, x = f"{node.output[0]}/input_{index}_wrong", node.input[index]
        node.input[index] = wrong  # first: inserting into a list of messages may move them
        for offset, new in enumerate(_parse(text, {"x": x, "y": wrong} | names, f"{wrong}/fault")):
            nodes.insert(place + offset, new)

    def exchange(self, first: str, second: str) -> None:
        """Readers of one value read the other, and the other way round."""
        names = {first: second, second: first}
        for node in {id(node): node for name in names for node in self.readers(name)}.values():
            _rename_inputs(node, names)

    def maker(self, name: str) -> onnx.NodeProto:
        """The node that makes a value; LookupError where there is none."""
        for _, node in self._walk(self.proto.node):
            if name in node.output:
                return node
        raise LookupError(f"{self.proto.name}: nothing makes {name!r}; the graph is no longer what this fault was written for")

    def set(self, op_type: str, where: Where | None = None, **attributes: Any) -> None:
        """Give the nodes of one type other attributes; None takes one away."""
        for node in self.find(op_type, where):
            kept = [item for item in node.attribute if item.name not in attributes]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items() if value is not None)

    def retype(self, op_type: str, other: str, where: Where | None = None) -> None:
        """Make the nodes of one type another."""
        for node in self.find(op_type, where):
            node.op_type = other

    def skip(self, node: onnx.NodeProto, keep: int) -> None:
        """Hand out one input of the node as its output."""
        node.CopyFrom(onnx.helper.make_node("Identity", [node.input[keep]], [node.output[0]], name=node.name))

    def _places(self) -> Iterator[tuple[Nodes, int]]:
        for nodes, node in self._walk(self.proto.node):
            yield nodes, next(index for index, other in enumerate(nodes) if other is node or other.output == node.output)

    def _walk(self, nodes: Nodes) -> Iterator[tuple[Nodes, onnx.NodeProto]]:
        for node in nodes:
            yield nodes, node
            for item in node.attribute:
                if item.type == onnx.AttributeProto.GRAPH:
                    yield from self._walk(item.g.node)


def in_body(op: str, change: Callable[[Part], None]) -> Callable[[onnx.ModelProto], None]:
    """A change of every body of an op."""

    def edit(model: onnx.ModelProto) -> None:
        op_type = "Wm" + "".join(word.capitalize() for word in op.split("_"))
        bodies = [function for function in model.functions if function.name == op_type]
        if not bodies:
            raise LookupError(f"no body of {op_type}")
        for body in bodies:
            change(Part(body, model))

    return edit


def in_graph(change: Callable[[Part], None]) -> Callable[[onnx.ModelProto], None]:
    """A change of the main graph."""
    return lambda model: change(Part(model.graph, model))


def edit_file(folder: Path, graph: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Edit one of a bundle's ONNX files; the manifest agrees with it again."""
    model = onnx.load(str(folder / graph), load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    edit(model)
    if model.SerializeToString(deterministic=True) == before:
        raise LookupError(f"{graph}: the edit changed nothing")
    (folder / graph).write_bytes(model.SerializeToString(deterministic=True))
    resign(folder, graph)


def _parse(text: str, names: dict[str, str], prefix: str) -> list[onnx.NodeProto]:
    """The nodes of a text such as "a = Neg(x) \\n y = Exp(a)"; what it names anew gets the prefix."""
    source = f'<opset_import: ["" : 23, "com.microsoft" : 1], domain: "fault"> fault (x) => (y) {{ {text} }}'
    nodes = list(onnx.parser.parse_function(source).node)
    names = {output: f"{prefix}_{output}" for node in nodes for output in node.output if output != "y"} | names
    for node in nodes:
        _rename_inputs(node, names)
        _rename_outputs(node, names)
    return nodes


def _rename_inputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]


def _rename_outputs(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.output[:] = [names.get(name, name) for name in node.output]
