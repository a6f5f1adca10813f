"""A process that runs a model of one WmAdd node in ONNX Runtime, with a library and options, and prints what came of it as JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from native_kernels_worker import load_double


def model(dtype: int = TensorProto.FLOAT) -> bytes:
    """y = 2 a + state, next = a + state: a WmAdd node, named `layers.0`, with a body."""
    body = [
        helper.make_node("Add", ["a", "state"], ["sum"]),
        helper.make_node("Add", ["sum", "a"], ["y"]),
        helper.make_node("Identity", ["sum"], ["next"]),
    ]
    function = helper.make_function("wm", "WmAdd", ["a", "state", "bias"], ["y", "next"], body, [helper.make_opsetid("", 23)])
    node = helper.make_node("WmAdd", ["a", "state"], ["y", "state.next"], domain="wm", name="layers.0")
    values = {name: helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in ("a", "state", "y", "state.next")}
    graph = helper.make_graph([node], "one", [values["a"], values["state"]], [values["y"], values["state.next"]])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("wm", 1)]
    made = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three calls whose state is bound to input and output, and one that copies it."""
    double = load_double(arguments.double) if arguments.double else None
    if double is not None:
        double.double_set_running(1)
    options = onnxruntime.SessionOptions()
    for option in arguments.option:
        options.add_session_config_entry(*option.split("=", 1))
    if arguments.library:
        options.register_custom_ops_library(str(arguments.library))
    session = onnxruntime.InferenceSession(model(), options, providers=["CPUExecutionProvider"])
    a, before = np.arange(12, dtype=np.float32).reshape(3, 4), np.full((3, 4), 0.5, np.float32)
    y, after = session.run(None, {"a": a, "state": before})
    state = onnxruntime.OrtValue.ortvalue_from_numpy(before.copy())
    binding = session.io_binding()
    binding.bind_cpu_input("a", a)
    binding.bind_ortvalue_input("state", state)
    binding.bind_output("y")
    binding.bind_ortvalue_output("state.next", state)
    for _ in range(3):
        session.run_with_iobinding(binding)
    right = bool((y == 2 * a + before).all() and (after == a + before).all() and (state.numpy() == 3 * a + before).all())
    launches, copies = (double.double_launches(), double.double_calls(b"cuMemcpyDtoDAsync")) if double else (0, 0)
    return {"right": right, "launches": launches, "copies": copies}


def main() -> None:
    """Print the result, or the error's line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--double", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--option", action="append", default=[])
    try:
        answer = run(parser.parse_args())
    except Exception as error:  # ONNX Runtime's own classes have no public common base
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
