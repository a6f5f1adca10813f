"""ONNX headers over the bundle's weights: exported program -> one ModelProto per flavour, with every `wm` op a named node and function."""

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir import passes
from onnx_ir.passes import common as passes_common
from onnxscript import opset23

from wm_export.onnxruntime_graph import multiply_on_host, tune_for_cuda, tune_for_onnxruntime
from wm_export.program import Program
from wm_graph.errors import ExportError
from wm_graph.quiet import quiet_libraries
from wm_graph.taps import OP_OUTPUTS, TapNames
from wm_kernels.onnx_body import MICROSOFT, Flavour
from wm_kernels.onnx_functions import OPSET, TRANSLATIONS, add_bodies

Graph = Literal["portable", "ort", "cuda"]
FILES: dict[Graph, str] = {"portable": "model.onnx", "ort": "model.ort.onnx", "cuda": "model.cuda.onnx"}
_BODIES: dict[Graph, Flavour] = {"portable": "portable", "ort": "ort", "cuda": "portable"}
_TUNE: dict[Graph, Callable[[onnx.ModelProto], None]] = {"ort": tune_for_onnxruntime, "cuda": tune_for_cuda}


def graphs_of(dtype: torch.dtype) -> tuple[Graph, ...]:
    """The files of a dtype: one of them is for ONNX Runtime on CPUs, which has no bfloat16."""
    return tuple(graph for graph in FILES if graph != "ort" or dtype != torch.bfloat16)


_SCOPE = re.compile(r"layers\.\d+")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def stored_tensors(weights: Path) -> dict[str, StoredTensor]:
    """Name -> place of every tensor of a safetensors file, offsets counted from the start of the file."""
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    places: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        places[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
    return places


def onnx_from_program(
    program: Program, weights: Path, weights_name: str, graphs: Sequence[Graph] = tuple(FILES)
) -> dict[Graph, onnx.ModelProto]:
    """The ONNX files of a model, as headers that read their weights from a safetensors file beside them.

    Args:
        program: the exported program; its parameters carry checkpoint names behind `model.`.
        weights: the safetensors file, already written.
        weights_name: its name relative to the ONNX files.
        graphs: which of them.

    Raises:
        ExportError: the exporter changed the opset behind our back, or a parameter is not in the weights.
    """
    model = _translate(program)
    _point_to_weights(model, stored_tensors(weights), weights_name)
    _fold_shapes(model)
    _name_values(model, program)
    _strip(model)
    protos: dict[Graph, onnx.ModelProto] = {}
    for graph in graphs:
        proto = ir.serde.serialize_model(model)
        multiply_on_host(proto)
        if graph in _TUNE:
            _TUNE[graph](proto)
        add_bodies(proto, _BODIES[graph])
        _name_absent_inputs(proto)
        _declare_opsets(proto)
        protos[graph] = proto
    return protos


def _translate(program: Program) -> ir.Model:
    """torch's exporter with our translations; everything it prints or warns about its own internals is kept quiet."""
    table: dict[Any, Any] = {getattr(torch.ops.wm, name.removeprefix("wm::")).default: function for name, function in TRANSLATIONS.items()}
    table[torch.ops.aten.softplus.default] = _softplus
    with quiet_libraries():
        onnx_program = torch.onnx.export(
            program.exported, (), dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False, optimize=False
        )
    assert onnx_program is not None
    model: ir.Model = onnx_program.model
    if model.opset_imports.get("") != OPSET:
        written = model.opset_imports.get("")
        raise ExportError(f"ONNX export: asked for opset {OPSET}, the exporter wrote {written}; use the pinned torch and onnxscript")
    return model


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """x above the threshold, where runtimes may overflow; the exporter's translation multiplies and divides by beta, which is 1 here."""
    if beta != 1.0:
        raise ExportError(f"ONNX export: softplus with beta {beta}, expected 1")
    op: Any = opset23  # its stubs know tensors by element type, which a traced value does not tell
    return op.Where(op.Greater(x, op.CastLike(op.Constant(value_float=threshold), x)), x, op.Softplus(x))


def _fold_shapes(model: ir.Model) -> None:
    """Fold the exporter's shape arithmetic, share equal subexpressions, turn sequences into Split; parameters stay as they are."""
    parameters = set(model.graph.initializers)

    def should_fold(node: ir.Node) -> bool | None:
        reads_parameter = any(value is not None and value.name in parameters for value in node.inputs)
        return False if reads_parameter else None

    with quiet_libraries():
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        passes.Sequential(
            passes_common.RemoveUnusedNodesPass(),
            passes_common.CommonSubexpressionEliminationPass(),
            passes_common.RemoveUnusedNodesPass(),
            passes_common.RemoveUnusedOpsetsPass(),
        )(model)


def _name_values(model: ir.Model, program: Program) -> None:
    """Give inputs, outputs, `wm` nodes and their outputs their contract names."""
    graph = model.graph
    for value, name in zip(graph.inputs, program.inputs, strict=True):
        value.name = name
    names = TapNames()
    taken = set(program.inputs) | set(program.outputs)
    for node in _wm_nodes(graph):
        op = _snake(node.op_type)
        prefix = names.next(_scope(node), op)
        node.name = prefix
        for value, output in zip(node.outputs, OP_OUTPUTS[op], strict=True):
            value.name = f"{prefix}.{output}"
            taken.add(value.name)
    for value, name in zip(graph.outputs, program.outputs, strict=True):
        value.name = name
    _name_the_rest(graph, taken)


def _name_the_rest(graph: ir.Graph, taken: set[str]) -> None:
    """Nodes that are not ours are named by layer and count; values by the exporter, which is deterministic."""
    counts: dict[str, int] = {}
    for node in graph:
        if node.domain == "wm":
            continue
        base = f"{_scope(node) or 'model'}/{node.op_type}"
        counts[base] = counts.get(base, 0) + 1
        node.name = f"{base}_{counts[base]}"


def _wm_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == "wm")


def _scope(node: ir.Node) -> str:
    """`layers.3` from the node's module path, or empty for the model's own nodes."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    found = _SCOPE.search(scopes)
    return found.group(0) if found else ""


def _snake(op_type: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", op_type.removeprefix("Wm")).lower()


def _point_to_weights(model: ir.Model, stored: dict[str, StoredTensor], weights_name: str) -> None:
    """Replace every parameter by a reference into the weights file; small constants of the exporter stay inside."""
    initializers = model.graph.initializers
    for name in list(initializers):
        value = initializers[name]
        parameter = name.removeprefix("model.")
        if parameter not in stored:
            if value.const_value is None or value.const_value.size > 1024:
                raise ExportError(f"ONNX export: initializer {name!r} is no parameter of the weights file; the exporter changed the graph")
            continue
        place = stored[parameter]
        assert value.const_value is not None
        shape = tuple(value.const_value.shape.numpy())
        if shape != place.shape:
            raise ExportError(f"ONNX export: {parameter!r} has shape {list(shape)}, the weights file {list(place.shape)}")
        value.const_value = ir.ExternalTensor(
            weights_name, place.offset, place.length, value.const_value.dtype, shape=ir.Shape(place.shape), name=parameter
        )
        initializers.pop(name)
        value.name = parameter
        initializers[parameter] = value


def _strip(model: ir.Model) -> None:
    """Remove what differs from machine to machine or says nothing to a runtime: stack traces, paths, docs."""
    model.producer_name, model.producer_version, model.doc_string = "wm-graph", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_absent_inputs(proto: onnx.ModelProto) -> None:
    """Give every call of a function as many inputs as it has, the last too, by empty names: onnx's reference evaluator takes no fewer."""
    counts = {(function.name, function.overload): len(function.input) for function in proto.functions}
    for node in proto.graph.node:
        if node.domain == "wm":
            node.input.extend([""] * (counts[node.op_type, node.overload] - len(node.input)))


def _declare_opsets(proto: onnx.ModelProto) -> None:
    """Import every domain that the main graph and the function bodies use, each once, in a fixed order."""
    versions = {item.domain: item.version for item in proto.opset_import} | {"wm": 1}
    if any(node.domain == MICROSOFT for node in proto.graph.node):
        versions[MICROSOFT] = 1
    for function in proto.functions:
        for item in function.opset_import:
            known = versions.setdefault(item.domain, item.version)
            if known != item.version:
                raise ExportError(f"ONNX export: {function.name} imports {item.domain or 'ai.onnx'} {item.version}, the model {known}")
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
