"""A process with libwm_kernels and the double of the CUDA driver, which must not be loaded beside the real one.

JSON lines in, JSON lines out. A request names a folder, an op, its arguments, and tensors as [dtype, shape, address] or null; the answer
holds layouts, scratch bytes and what the double was told to launch, or the error's class and line.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from wm_graph.errors import WmError
from wm_runtimes.native_kernels import DeviceTensor, NativeKernels

SCRATCH = 1 << 50


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("parameters", ctypes.c_uint32),
        ("programmatic", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * 130),
    )


def load_double(path: Path) -> ctypes.CDLL:
    """The double, with context 1 current; whatever asks for libcuda.so.1 afterwards gets it."""
    double = ctypes.CDLL(str(path))
    double.double_launches.restype = ctypes.c_int64
    double.double_calls.restype = ctypes.c_int64
    double.double_launch_at.restype = ctypes.POINTER(_Launch)
    double.double_launch_at.argtypes = (ctypes.c_int64,)
    double.double_set_context.argtypes = (ctypes.c_uint64,)
    double.double_reset()
    double.double_set_context(1)
    return double


def _tensor(given: Any) -> DeviceTensor | None:
    return None if given is None else DeviceTensor(given[2], tuple(given[1]), given[0])


def _launches(double: ctypes.CDLL) -> list[dict[str, Any]]:
    found = []
    for index in range(double.double_launches()):
        one = double.double_launch_at(index).contents
        values = list(one.values[: one.parameters])
        told = {"grid": list(one.grid), "values": values, "stream": one.stream, "programmatic": one.programmatic}
        found.append({"name": one.name.decode(), **told})
    return found


def answer(double: ctypes.CDLL, request: Any) -> dict[str, Any]:
    """What comes of one call."""
    double.double_reset()
    double.double_set_context(1)
    inputs = [_tensor(one) for one in request["inputs"]]
    dtypes = [None if one is None else one.dtype for one in inputs]
    try:
        with NativeKernels(request["folder"]) as kernels, kernels.op(request["op"], request["arguments"], dtypes) as op:
            layouts = op.layouts(inputs)
            places = request.get("outputs") or [(100 + index) << 40 for index in range(len(layouts))]
            outputs = [DeviceTensor(place, shape, dtype) for place, (dtype, shape) in zip(places, layouts, strict=True)]
            size = op.scratch_bytes(inputs, outputs)
            op.launch(inputs, outputs, SCRATCH, size, 7)
            return {"layouts": layouts, "scratch": size, "launches": _launches(double)}
    except WmError as error:
        return {"error": type(error).__name__, "line": str(error), "launches": _launches(double)}


def main() -> None:
    """Answer requests until the input ends."""
    double = load_double(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(answer(double, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
