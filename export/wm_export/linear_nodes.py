"""Linear layers of the graph for GPUs as WmLinear nodes, with what follows them: the split into parts, step sizes, the gate.

In half precision alone: float32 products are another library's strength. M rows, K inputs, N outputs, A, B, C, H widths of parts.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import onnx
import torch

from wm_kernels.linear.onnx_function import INPUTS, OP_TYPE, WIDTHS
from wm_kernels.native import Use
from wm_kernels.onnx_body import DOMAIN

DTYPES = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}
PARTS = 3  # of a node, step sizes apart


@dataclass(frozen=True)
class _Joined:
    """What a linear layer becomes: names and widths of its outputs, the bias of step sizes, and the nodes that it takes the place of."""

    outputs: tuple[tuple[str, int], ...]
    step: tuple[str, int] = ("", 0)
    step_bias: str = ""
    gated: bool = False
    replaced: tuple[onnx.NodeProto, ...] = ()


class _Graph:
    """Who makes and who reads the values of a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.weights = {item.name: item for item in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._kept = {output.name for output in graph.output}

    def readers(self, name: str, *op_types: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, if they are of these types, one of each, and nobody else wants it."""
        found = self._readers[name]
        alike = Counter(node.op_type for node in found) == Counter(op_types)
        return sorted(found, key=lambda node: op_types.index(node.op_type)) if alike and name not in self._kept else []

    def reader(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """The only node that reads a value, if it is of this type."""
        return next(iter(self.readers(name, op_type)), None)

    def sizes(self, split: onnx.NodeProto, width: int) -> list[int]:
        """The widths of the parts of a Split of so many columns; none where they are not known, or rows are split."""
        if next((item.i for item in split.attribute if item.name == "axis"), 0) not in (1, -1):
            return []
        if len(split.input) < 2:
            return [width // len(split.output)] * len(split.output) if width % len(split.output) == 0 else []
        given = self.weights.get(split.input[1])
        if given is None:
            made = self.makers.get(split.input[1])
            given = made.attribute[0].t if made is not None and made.op_type == "Constant" and made.attribute[0].HasField("t") else None
        return [] if given is None else [int(size) for size in onnx.numpy_helper.to_array(given)]


def join_linear_layers(proto: onnx.ModelProto) -> None:
    """Rewrite the main graph in place: every product with a weight in half precision is a WmLinear node."""
    graph = _Graph(proto.graph)
    for gemm in [node for node in proto.graph.node if _is_linear(node, graph)]:
        weight = graph.weights[gemm.input[1]]
        joined = _joined(graph, gemm.output[0], weight.dims[0])
        widths = [width for _, width in joined.outputs] + [0] * (PARTS - len(joined.outputs)) + [joined.step[1]]
        names = [name for name, _ in joined.outputs] + [""] * (PARTS - len(joined.outputs)) + [joined.step[0]]
        outputs = [name or f"{gemm.name}/no_{part}" for name, part in zip(names, WIDTHS, strict=True)]
        bias = gemm.input[2] if len(gemm.input) > 2 else ""
        inputs = [*gemm.input[:2], bias, joined.step_bias]
        gemm.CopyFrom(onnx.helper.make_node(OP_TYPE, inputs, outputs, name=gemm.name, domain=DOMAIN))
        for name, value in (*zip(WIDTHS, widths, strict=True), ("gated", int(joined.gated))):
            gemm.attribute.append(onnx.helper.make_attribute(name, value))
        for node in joined.replaced:
            proto.graph.node.remove(node)
    _drop_unread(proto.graph)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Sizes of parts are numbers of a node now."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type == "Constant" and not read.intersection(node.output)]:
        graph.node.remove(node)
    for item in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(item)


def _is_linear(node: onnx.NodeProto, graph: _Graph) -> bool:
    """Whether a node is x W^T with a weight of half precision, and a bias if any."""
    if node.op_type != "Gemm" or not all(name in graph.weights for name in node.input[1:] if name):
        return False
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | values == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    weight, bias = graph.weights[node.input[1]], [graph.weights[name] for name in node.input[2:] if name]
    return plain and weight.data_type in DTYPES and all(list(item.dims) == [weight.dims[0]] for item in bias)


def _joined(graph: _Graph, y: str, width: int) -> _Joined:
    """The layer with what follows it."""
    alone = _step_sizes(graph, y, width)
    if alone is not None:
        return alone
    split = graph.reader(y, "Split")
    sizes = [] if split is None else graph.sizes(split, width)
    if split is None or not sizes:
        return _Joined(((y, width),))
    pieces = list(zip(split.output, sizes, strict=True))
    return _gated(graph, split, pieces) or _parted(graph, split, pieces) or _Joined(((y, width),))


def _gated(graph: _Graph, split: onnx.NodeProto, pieces: list[tuple[str, int]]) -> _Joined | None:
    """SiLU(first half) * second half, where that is all that is done with them."""
    if len(pieces) != 2 or pieces[0][1] != pieces[1][1]:
        return None
    (gate, width), (up, _) = pieces
    halves = graph.readers(gate, "Sigmoid", "Mul")
    if not halves:
        return None
    sigmoid, product = halves
    last = graph.reader(product.output[0], "Mul")
    if last is None or graph.reader(sigmoid.output[0], "Mul") is not product or graph.reader(up, "Mul") is not last:
        return None
    return _Joined(((last.output[0], width),), gated=True, replaced=(split, sigmoid, product, last))


def _parted(graph: _Graph, split: onnx.NodeProto, pieces: list[tuple[str, int]]) -> _Joined | None:
    """The parts, the last of which may be step sizes."""
    *others, (last, width) = pieces
    steps = _step_sizes(graph, last, width)
    if steps is not None and len(others) <= PARTS:
        return _Joined(tuple(others), steps.step, steps.step_bias, replaced=(split, *steps.replaced))
    return _Joined(tuple(pieces), replaced=(split,)) if len(pieces) <= PARTS else None


def _step_sizes(graph: _Graph, y: str, width: int) -> _Joined | None:
    """softplus(y + bias) in float32, where that is all that is done with y."""
    cast = graph.reader(y, "Cast")
    if cast is None or cast.attribute[0].i != onnx.TensorProto.FLOAT:
        return None
    replaced, bias, value = [cast], "", cast.output[0]
    add = graph.reader(value, "Add")
    if add is not None:
        (other,) = (name for name in add.input if name != value)
        widened = graph.makers.get(other)
        if widened is None or widened.op_type != "Cast" or not graph.reader(other, "Add"):
            return None
        given = graph.weights.get(widened.input[0])
        if given is None or given.data_type not in DTYPES or list(given.dims) != [width]:
            return None
        replaced, bias, value = [*replaced, add, widened], widened.input[0], add.output[0]
    softplus = graph.reader(value, "Softplus")
    return None if softplus is None else _Joined((), (softplus.output[0], width), bias, replaced=(*replaced, softplus))


def linear_uses(proto: onnx.ModelProto) -> list[Use]:
    """The ways in which a graph's WmLinear nodes call the op, each once, in the order of the graph."""
    weights = {item.name: item for item in proto.graph.initializer}
    found: dict[Use, None] = {}
    for node in proto.graph.node:
        if node.op_type != OP_TYPE:
            continue
        values = {item.name: item.i for item in node.attribute}
        plain = (*((name, values[name]) for name in WIDTHS), ("gated", bool(values["gated"])))
        weight = weights[node.input[1]]
        N, K = weight.dims
        inputs = zip((name for name, _ in INPUTS), node.input, strict=False)
        dtypes = tuple((name, DTYPES[weight.data_type]) for name, given in inputs if given)
        sizes: tuple[tuple[str, int | None], ...] = (("M", None), ("K", K), ("N", N))
        found[Use("linear", plain, dtypes, (*sizes, ("H", values["H"])) if node.input[3] else sizes)] = None
    return list(found)
