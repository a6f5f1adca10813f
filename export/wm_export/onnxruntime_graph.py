"""Rewrites of the main graphs that ONNX Runtime runs, on CPUs and on GPUs, that make it faster; the ops' own bodies are in wm_kernels."""

import numpy as np
import onnx

from wm_export.linear_nodes import join_linear_layers
from wm_kernels.onnx_body import DOMAIN, MICROSOFT

SCANS = ("WmSsdScan", "WmSsdScanRope")


def multiply_on_host(proto: onnx.ModelProto) -> None:
    """Range(0, n T, T) in place of Range(0, n, 1) * T for sizes n and T: the product of sizes is then no longer taken on the device.

    A size that a GPU's node reads would have to be copied there, and ONNX Runtime captures no CUDA graph of a model that copies.
    """
    graph, make = proto.graph, onnx.helper.make_node
    made = {output: node for node in graph.node for output in node.output}
    for node in list(graph.node):
        if node.op_type != "Mul":
            continue
        first, second = (made.get(name) for name in node.input)
        if second is None or first is None or first.op_type != "Range" or second.op_type != "Squeeze" or not _counts(proto, first):
            continue
        end, place = f"{node.name}/end", list(graph.node).index(node)
        product = make("Mul", [first.input[1], node.input[1]], [end], name=end)
        steps = make("Range", [first.input[0], end, node.input[1]], list(node.output), name=node.name)
        graph.node.remove(node)
        for new in (steps, product):
            graph.node.insert(place, new)
        if not any(first.output[0] in other.input for other in graph.node):
            graph.node.remove(first)


def _counts(proto: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether a Range is 0, 1, 2, ..."""
    known = _known_integers(proto)
    return [known.get(name) for name in (node.input[0], node.input[2])] == [0, 1]


def _known_integers(proto: onnx.ModelProto) -> dict[str, int]:
    """The integers, or lists of one, that are constants of the main graph, by name."""
    tensors = {item.name: item for item in proto.graph.initializer if item.data_type == onnx.TensorProto.INT64}
    found: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Constant" and len(node.attribute[0].ints) == 1:
            found[node.output[0]] = node.attribute[0].ints[0]
    return found | {
        name: int(onnx.numpy_helper.to_array(item).item()) for name, item in tensors.items() if np.prod(item.dims, dtype=int) == 1
    }


def tune_for_onnxruntime(proto: onnx.ModelProto) -> None:
    """Rewrite the main graph in place; what it computes stays the same up to rounding."""
    _join_sums_with_norms(proto)
    _drop_thresholds_of_softplus(proto)
    _map_tied_head_apart(proto)
    _mask_steps_once(proto)


def tune_for_cuda(proto: onnx.ModelProto) -> None:
    """Rewrite the main graph in place for ONNX Runtime's CUDA provider, where a decode step costs what its many small nodes cost."""
    _take_sizes_as_they_are(proto)
    _drop_thresholds_of_softplus(proto)
    _join_sums_into_residual_norms(proto)
    join_linear_layers(proto)


def _take_sizes_as_they_are(proto: onnx.ModelProto) -> None:
    """Shape(x)[i:i+1] in the place of a list that is made of it by way of a number: nodes and memory on the host that nobody needs."""
    graph, known = proto.graph, _known_integers(proto)
    made = {output: node for node in graph.node for output in node.output}
    kept = {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type == "Reshape" and known.get(node.input[1]) == -1]:
        number = made.get(node.input[0])
        size = None if number is None or number.op_type != "Squeeze" else made.get(number.input[0])
        if size is None or size.op_type != "Shape" or kept.intersection(node.output):
            continue
        ends = {item.name: item.i for item in size.attribute}
        if ends.get("end", 0) - ends.get("start", 0) != 1:
            continue
        for reader in graph.node:
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = size.output[0]
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for node in [node for node in graph.node if node.op_type == "Squeeze" and node.output[0] not in read]:
        graph.node.remove(node)


def _join_sums_into_residual_norms(proto: onnx.ModelProto) -> None:
    """Make a WmResidualRmsNorm of x + scale * residual and the norm that reads it, in models that have such nodes for the same call.

    The layers' own end with the sum, the next begins with the norm. The node rounds the sum once where the two rounded it twice.
    """
    graph, make = proto.graph, onnx.helper.make_node
    known = {(_epsilon(node, "eps"), bool(node.input[2])) for node in graph.node if node.op_type == "WmResidualRmsNorm"}
    constants = {item.name for item in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    readers: dict[str, int] = {}
    for name in [*(name for node in graph.node for name in node.input), *(output.name for output in graph.output)]:
        readers[name] = readers.get(name, 0) + 1
    for norm in [node for node in graph.node if node.op_type == "RMSNormalization"]:
        total = made.get(norm.input[0])
        if total is None or total.op_type != "Add" or constants.intersection(total.input) or norm.input[1] not in constants:
            continue
        x, residual, scale = total.input[0], total.input[1], ""
        product = made.get(residual)
        if product is not None and product.op_type == "Mul" and readers[residual] == 1 and product.input[0] in constants:
            scale, residual = product.input
        if (_epsilon(norm, "epsilon"), bool(scale)) not in known:
            continue
        outputs = [norm.output[0], total.output[0]]
        joined = make("WmResidualRmsNorm", [x, residual, scale, norm.input[1]], outputs, name=f"{norm.name}/joined", domain=DOMAIN)
        joined.attribute.append(onnx.helper.make_attribute("eps", _epsilon(norm, "epsilon")))
        graph.node.remove(norm)
        total.CopyFrom(joined)
        if scale:
            graph.node.remove(product)


def _epsilon(node: onnx.NodeProto, name: str) -> float:
    return float(next(item.f for item in node.attribute if item.name == name))


def _join_sums_with_norms(proto: onnx.ModelProto) -> None:
    """Make one SkipSimplifiedLayerNormalization of a residual sum and the norm that reads it: onnxruntime does not do so by itself.

    The kernel is float32's; sums that are an output, or that add a parameter, stay as they are.
    """
    graph = proto.graph
    constants = {item.name for item in graph.initializer}
    fixed = {item.name for item in graph.output} | constants
    sums = {node.output[0]: node for node in graph.node if node.op_type == "Add" and not fixed & {*node.input, *node.output}}
    for norm in [node for node in graph.node if node.op_type == "RMSNormalization" and node.input[0] in sums]:
        weight = next((item for item in graph.initializer if item.name == norm.input[1]), None)
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
            continue
        total = sums.pop(norm.input[0])
        (epsilon,) = (item.f for item in norm.attribute if item.name == "epsilon")
        outputs = [norm.output[0], "", "", total.output[0]]
        inputs = [*total.input, norm.input[1]]
        joined = onnx.helper.make_node(
            "SkipSimplifiedLayerNormalization", inputs, outputs, name=norm.name, domain=MICROSOFT, epsilon=epsilon
        )
        graph.node.remove(norm)
        total.CopyFrom(joined)


def _drop_thresholds_of_softplus(proto: onnx.ModelProto) -> None:
    """Softplus instead of the exporter's x > 20 ? x : softplus(x): onnxruntime's Softplus does not overflow."""
    graph = proto.graph
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Where":
            continue
        greater, _, softplus = (made.get(name) for name in node.input)
        if greater is None or softplus is None or (greater.op_type, softplus.op_type) != ("Greater", "Softplus"):
            continue
        if greater.input[0] == softplus.input[0] == node.input[1]:
            node.CopyFrom(onnx.helper.make_node("Softplus", [node.input[1]], list(node.output), name=node.name))
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type in ("Greater", "Softplus") and node.output[0] not in read]:
        graph.node.remove(node)


def _map_tied_head_apart(proto: onnx.ModelProto) -> None:
    """Give a tied head an initializer of its own over the embedding's bytes in the weights file.

    onnxruntime packs the weights of matrix products into private copies and then lets go of its mapping of the file. An embedding it must
    keep for the look-ups; with a mapping of its own for the head, of the embedding's only the rows that are looked up become resident.
    """
    graph = proto.graph
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in looked_up:
            head = onnx.TensorProto()
            head.CopyFrom(next(item for item in graph.initializer if item.name == node.input[1]))
            head.name = "head"
            graph.initializer.append(head)
            node.input[1] = "head"


def _mask_steps_once(proto: onnx.ModelProto) -> None:
    """Set the step sizes of tokens that do not count to 0 before each scan, with one mask for all layers; each scan would make its own."""
    graph, make = proto.graph, onnx.helper.make_node
    scans = [node for node in graph.node if node.op_type in SCANS]
    if not scans:
        return
    for name, value in {"zero": 0, "one": 1, "axis_1": [1], "axes_1_2": [1, 2], "no_step": np.float32(0)}.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), f"mask/{name}"))
    mask = [
        make("Shape", ["tokens"], ["mask/length"], start=1, end=2),
        make("Squeeze", ["mask/length"], ["mask/count"]),
        make("Range", ["mask/zero", "mask/count", "mask/one"], ["mask/token_T"]),
        make("Unsqueeze", ["mask/token_T", "mask/axis_1"], ["mask/token_T1"]),
        make("Unsqueeze", [scans[0].input[-1], "mask/axes_1_2"], ["mask/valid_B11"]),
        make("Less", ["mask/token_T1", "mask/valid_B11"], ["mask/counts_BT1"]),
    ]
    nodes = []
    for node in graph.node:
        if node.op_type in SCANS:
            step_size = f"{node.name}/masked"
            nodes.append(make("Where", ["mask/counts_BT1", node.input[1], "mask/no_step"], [step_size], name=step_size))
            node.input[1] = step_size
            node.attribute.append(onnx.helper.make_attribute("masked", 1))
        nodes.append(node)
    del graph.node[:]
    graph.node.extend([*mask, *nodes])
