"""A bundle that needs no exporter: a graph with the contract's names whose numbers are small integers, so that equality is exact.

The logits mix a running sum (a recurrent leaf) and a position-weighted sum over a cache of fixed capacity (a kv leaf); writing past the
capacity, padding included, fails as a real cache would.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from wm_graph.config import ModelConfig
from wm_runtimes import Session, sha256_of

VOCAB = 16
CONFIG = ModelConfig(
    name="toy", vocab_size=VOCAB, d_model=8, d_ff=8, layers=(("attention", "mlp"),), n_head=1, n_kv_head=1, head_dim=8, keep_window=3
)
STATE: list[dict[str, Any]] = [
    {"name": "position", "kind": "position", "dtype": "int64", "shape": ["batch"], "reset": 0, "alias": False},
    {"name": "layers.0.ssd", "kind": "ssm", "dtype": "float32", "shape": ["batch", 1], "reset": 0.0, "alias": True},
    {"name": "layers.0.k", "kind": "kv", "dtype": "float32", "shape": ["batch", "capacity"], "reset": 0.0, "alias": True},
    {"name": "layers.0.score", "kind": "score", "dtype": "float32", "shape": ["batch", 1], "reset": "-inf", "alias": True},
    {
        "name": "layers.0.slot_position",
        "kind": "slot_position",
        "dtype": "int64",
        "shape": ["batch", "window"],
        "reset": -1,
        "alias": False,
    },
]
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

NODES = """
# inputs, masked by valid
Shape tokens -> tokens_shape
Gather tokens_shape one -> T
Range zero T one -> t
Unsqueeze valid axis1 -> valid_B1
Less t valid_B1 -> mask
Cast tokens -> ids
Add ids one_f -> ids1
Where mask ids1 zero_f -> x
# recurrent sum, which never falls, so that its last value is its largest
CumSum x one -> sums
Add layers.0.ssd sums -> running
ReduceMax running axis1 -> layers.0.ssd.next
# cache: written at position + t, read up to and including it
Unsqueeze position axis1 -> position_B1
Add position_B1 t -> cell
ScatterElements layers.0.k cell x -> layers.0.k.next
Shape layers.0.k.next -> cache_shape
Gather cache_shape one -> capacity
Range zero capacity one -> s
Unsqueeze cell axis2 -> cell_BT1
LessOrEqual s cell_BT1 -> seen
Cast s -> s_f
Add s_f one_f -> weight
Mul layers.0.k.next weight -> weighted
Unsqueeze weighted axis1 -> weighted_B1S
Where seen weighted_B1S zero_f -> visible
ReduceSum visible axis2 -> read_BT1
Squeeze read_BT1 axis2 -> read
# the rest of the state
Where mask ids1 lowest -> ranked
ReduceMax ranked axis1 -> best
Max layers.0.score best -> layers.0.score.next
Add position valid -> position.next
Unsqueeze position.next axis1 -> end
Add end minus1 -> last
Greater valid_B1 zero -> any
Where any last layers.0.slot_position -> layers.0.slot_position.next
# logits of the selected tokens
GatherElements running select -> running_S
GatherElements read select -> read_S
Unsqueeze running_S axis2 -> running_S1
Unsqueeze read_S axis2 -> read_S1
Mul running_S1 w_sum -> part_sum
Mul read_S1 w_cache -> part_cache
Add part_sum part_cache -> both
Mod both modulus -> logits
"""


def make_toy_bundle(path: Path, **overrides: Any) -> Path:
    """Write the bundle; `overrides` replace fields of its manifest."""
    path.mkdir(parents=True)
    weights = {"w_sum": np.arange(1, VOCAB + 1, dtype=np.float32), "w_cache": (np.arange(VOCAB, dtype=np.float32) * 7) % 11}
    save_file(weights, path / "model.safetensors")
    model = _model(path / "model.safetensors", list(weights))
    for name in ("model.onnx", "model.ort.onnx"):
        onnx.save(model, path / name)
    state = [leaf | {"output": f"{leaf['name']}.next"} for leaf in STATE]
    manifest = {
        "schema": 1,
        "name": "toy",
        "config": CONFIG.to_dict(),
        "dtype": "float32",
        "opset": 23,
        "parameters": 2 * VOCAB,
        "state": state,
        "versions": {"wm_graph": "0"},
        "limits": {"max_position": 4096, "vocab_size": VOCAB},
        "budgets": {},
        "tokens": {"bos": 0, "eos": 1, "pad": None, "stop": [1], "add_bos": False},
        "chat_template": None,
    }
    write_manifest(path, manifest | overrides)
    return path


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    files = sorted(file for file in path.iterdir() if file.name != "manifest.json")
    listed = {file.name: {"sha256": sha256_of(file), "size": file.stat().st_size} for file in files}
    (path / "manifest.json").write_text(json.dumps({"files": listed} | manifest))


def _model(weights: Path, names: list[str]) -> onnx.ModelProto:
    inputs = [_info("tokens", "int64", ["batch", "T"]), _info("valid", "int64", ["batch"]), _info("select", "int64", ["batch", "S"])]
    inputs += [_info(leaf["name"], leaf["dtype"], leaf["shape"]) for leaf in STATE]
    outputs = [_info("logits", "float32", ["batch", "S", VOCAB])]
    outputs += [_info(f"{leaf['name']}.next", leaf["dtype"], leaf["shape"]) for leaf in STATE]
    constants = {"zero": np.array(0), "one": np.array(1), "minus1": np.array(-1)}
    constants |= {"axis1": np.array([1]), "axis2": np.array([2])}
    constants |= {name: np.array(value, np.float32) for name, value in {"zero_f": 0, "one_f": 1, "lowest": -np.inf, "modulus": 97}.items()}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    initializers += _external(weights, names)
    graph = helper.make_graph(_nodes(), "toy", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _nodes() -> list[onnx.NodeProto]:
    attributes: dict[str, dict[str, int]] = {name: {"axis": 1} for name in ("ScatterElements", "GatherElements")}
    attributes |= {"Cast": {"to": TensorProto.FLOAT}, "ReduceSum": {"keepdims": 1}, "ReduceMax": {"keepdims": 1}, "Mod": {"fmod": 1}}
    nodes = []
    for row in NODES.strip().splitlines():
        if row.startswith("#"):
            continue
        left, output = row.split(" -> ")
        kind, *inputs = left.split()
        nodes.append(helper.make_node(kind, inputs, [output], name=f"toy.{output}", **attributes.get(kind, {})))
    return nodes


def _info(name: str, dtype: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _ONNX_TYPES[dtype], shape)


def _external(weights: Path, names: list[str]) -> list[TensorProto]:
    """Initializers whose data lies inside the safetensors file."""
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = []
    for name in names:
        start, end = header[name]["data_offsets"]
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=header[name]["shape"], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", weights.name), ("offset", 8 + length + start), ("length", end - start)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return tensors


def state_of(session: Session) -> dict[str, np.ndarray]:
    snapshot = session.snapshot()
    return snapshot.leaves | {"position": snapshot.position_B}


def assert_same_state(session: Session, before: dict[str, np.ndarray]) -> None:
    after = state_of(session)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
