"""The ONNX files as GPUs need them: sizes that stay on the host, few nodes, bfloat16."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest

from test_export import CONFIGS, EVERY_FAMILY, FILES, FOR_GPUS, assert_onnx_equals_eager
from wm_export.onnxruntime_graph import multiply_on_host
from wm_graph import load_checkpoint


@pytest.fixture(scope="session", params=CONFIGS)
def exported(request, made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny model, exported once."""
    return made(CONFIGS[request.param])


@pytest.fixture(scope="session", params=EVERY_FAMILY)
def family(request, made) -> tuple[Path, Path]:
    """(checkpoint, bundle) of a tiny model of every family."""
    return made(EVERY_FAMILY[request.param])


@pytest.mark.parametrize("tokens", [1, 65])
def test_the_file_for_gpus_equals_eager(family, tokens):
    assert_onnx_equals_eager(family, FOR_GPUS, 3, tokens)


def test_the_file_for_gpus_joins_sums_with_the_norms_that_read_them(exported):
    graphs = {file: onnx.load(exported[1] / file, load_external_data=False).graph for file in ("model.onnx", FOR_GPUS)}
    kinds = {file: [node.op_type for node in graph.node] for file, graph in graphs.items()}
    layers = len(load_checkpoint(exported[0])[0].layers)
    assert kinds["model.onnx"].count("WmResidualRmsNorm") == layers
    assert kinds[FOR_GPUS].count("WmResidualRmsNorm") == 2 * layers  # the last one is the head's
    assert (kinds["model.onnx"].count("RMSNormalization"), kinds[FOR_GPUS].count("RMSNormalization")) == (1 + layers, 1)
    assert "Greater" not in kinds[FOR_GPUS]
    names = {file: {node.name for node in graph.node if node.domain == "wm"} for file, graph in graphs.items()}
    assert names["model.onnx"] < names[FOR_GPUS]


# Where a node takes a size as one: its other inputs are tensors, which on a GPU would have to be copied there.
TAKES_SIZES = {"Reshape": {1}, "Expand": {1}, "Range": {0, 1, 2}, "Slice": {1, 2, 3, 4}, "Split": {1}, "ConstantOfShape": {0}, "Pad": {1}}
OF_SIZES = {"Shape", "Squeeze", "Unsqueeze", "Concat", "Reshape", "Add", "Sub", "Mul", "Div", "Min", "Max", "Gather", "Cast", "Identity"}


def leaked_sizes(graph: onnx.GraphProto) -> list[str]:
    """Nodes of the main graph that read a size as a tensor."""
    fixed = {item.name for item in graph.initializer} | {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    sizes: set[str] = set()
    found = []
    for node in graph.node:
        if node.op_type == "Shape" or (
            node.op_type in OF_SIZES and sizes.intersection(node.input) and all(name in sizes | fixed for name in node.input)
        ):
            sizes.update(node.output)
        elif any(name in sizes and place not in TAKES_SIZES.get(node.op_type, ()) for place, name in enumerate(node.input)):
            found.append(f"{node.name} ({node.op_type})")
    return found


@pytest.mark.parametrize("file", [*FILES, FOR_GPUS])
def test_no_size_is_read_as_a_tensor_outside_the_bodies(family, file):
    """ONNX Runtime computes sizes on the host: one that a GPU's node read would be copied there, and no CUDA graph could be captured."""
    graph = onnx.load(family[1] / file, load_external_data=False).graph
    if file == "model.ort.onnx":  # the mask of the scans, which this file's CPU has on the host anyway
        del graph.node[: next((i + 1 for i, node in enumerate(graph.node) if node.output[0] == "mask/counts_BT1"), 0)]
    assert not leaked_sizes(graph)
    assert leaked_sizes(_multiplied_on_the_device()) == ["rows (Mul)"]


def test_sizes_go_into_lists_as_shape_gives_them(family):
    def made_anew(file):
        graph = onnx.load(family[1] / file, load_external_data=False).graph
        made = {output: node for node in graph.node for output in node.output}
        numbers = [made[node.input[0]] for node in graph.node if node.op_type == "Reshape" and node.input[0] in made]
        return [node.name for node in numbers if node.op_type == "Squeeze" and made[node.input[0]].op_type == "Shape"]

    assert made_anew("model.onnx")
    assert not made_anew(FOR_GPUS)


def _multiplied_on_the_device() -> onnx.GraphProto:
    """What the exporter writes for arange(B) * T."""
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["tokens"], ["shape"], start=1, end=2),
        make("Squeeze", ["shape"], ["T"]),
        make("Range", ["zero", "B", "one"], ["count"]),
        make("Mul", ["count", "T"], ["rows"], name="rows"),
    ]
    values = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in (("zero", 0), ("one", 1), ("B", 3))]
    return onnx.helper.make_graph(nodes, "rows", [], [], values)


def test_rows_times_tokens_is_counted_in_steps_of_tokens():
    graph = _multiplied_on_the_device()
    kinds = [("tokens", onnx.TensorProto.INT64, ["B", "T"]), ("rows", onnx.TensorProto.INT64, [3])]
    tokens, rows = (onnx.helper.make_tensor_value_info(*kind) for kind in kinds)
    graph.input.append(tokens)
    graph.output.append(rows)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    for tokens_of_a_row in (1, 7):
        given = {"tokens": np.zeros((3, tokens_of_a_row), np.int64)}
        (before,) = onnx.reference.ReferenceEvaluator(model).run(None, given)
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        multiply_on_host(changed)
        assert not leaked_sizes(changed.graph)
        (after,) = onnx.reference.ReferenceEvaluator(changed).run(None, given)
        np.testing.assert_array_equal(after, before)


def test_a_bfloat16_bundle_has_no_file_for_cpus(made):
    """It runs nowhere but on GPUs; that its bodies are right is seen there, and in the same bodies in float16 and float32 here."""
    bundle = made(CONFIGS["cheems-tiny-moe"], "bf16")[1]
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert [name for name in files if name.endswith(".onnx")] == ["model.cuda.onnx", "model.onnx"]
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    stored = {item.name: item for item in model.graph.initializer if item.external_data}
    kinds = {item.data_type for item in stored.values()}
    assert kinds == {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT}
    assert all(
        item.data_type == onnx.TensorProto.BFLOAT16 or name.endswith("A_log") or name.endswith(".A") for name, item in stored.items()
    )
    outputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    assert outputs["logits"] == onnx.TensorProto.FLOAT
