"""Sessions of ONNX Runtime whose graph has values of its `wm` nodes as further outputs. Needs onnx.

B rows, T tokens, S selected tokens, V vocabulary.
"""

import ctypes
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from wm_graph.errors import BundleError
from wm_runtimes.bundle import Bundle
from wm_runtimes.onnxruntime_cpu import OnnxRuntimeCpuSession
from wm_runtimes.onnxruntime_cuda import OnnxRuntimeCudaSession
from wm_runtimes.onnxruntime_session import OnnxRuntimeSession
from wm_runtimes.state_buffers import Buffers

Array = np.ndarray[Any, np.dtype[Any]]
Wanted = Mapping[str, tuple[str, int]]


class PromotingSession(OnnxRuntimeSession):
    """A session that tells values of the last call; the file's header is changed in memory. Made by `open_promoting`.

    Attributes:
        wanted: name -> (node name, place): output 0, 1, ... of the node, or -1, -2, ... for its first, second, ... input.
        told: name -> value in the last call, of the wanted values that the graph computes: those that a node leaves out, and parameters
            and inputs of the graph, are not among them. bfloat16 is told as float32.
    """

    wanted: ClassVar[Wanted] = {}

    def __init__(self, bundle: Bundle, batch: int, capacity: int, **options: Any) -> None:
        self.told: dict[str, Array] = {}
        self._header: bytes | None = None
        self._states = {leaf.output: leaf for leaf in bundle.state}
        super().__init__(bundle, batch, capacity, **options)
        self._block = capacity  # a call is one run, whose values are told

    def _source(self) -> str | bytes:
        if self._header is None:
            self._header, self._values = _promoted(self._path, self.wanted)
            self._fresh = [value for value in dict.fromkeys(self._values.values()) if value not in self._states]
        return self._header

    def _open(self, entries: dict[str, str]) -> Any:
        return super()._open({"session.model_external_initializers_file_folder_path": str(self._path.parent), **entries})

    def _outputs(self) -> dict[str, str]:
        return {name: kind for name, kind in super()._outputs().items() if name not in self._fresh}

    def _binding(self, buffers: Buffers, start: int, shape: tuple[int, ...], selected: int) -> Any:
        self._last = super()._binding(buffers, start, shape, selected)  # those of large logits are not kept
        return self._last

    def _bind(self, buffers: Any, start: int, batch: int, length: int, selected: int) -> Any:
        binding = super()._bind(buffers, start, batch, length, selected)  # type: ignore[safe-super]  # the runtime's
        for value in self._fresh:
            binding.io.bind_output(value)
        return binding

    def _run_at_once(self, buffers: Any, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        arguments = (position_B, tokens_BT, valid_B, select_BS)
        logits_BSV = super()._run_at_once(buffers, start, *arguments)  # type: ignore[safe-super]  # the runtime's
        found: dict[str, Array] = {}
        if self._fresh:
            outputs = self._last.io.get_outputs()
            found = {name: _numpy(value) for name, value in zip(self._fresh, outputs[-len(self._fresh) :], strict=True)}
        rows, state = slice(start, start + len(tokens_BT)), buffers.copy()
        for value, leaf in self._states.items():
            if leaf.name in state:
                found[value] = _wide(state[leaf.name][rows]) if leaf.dtype == "bfloat16" else state[leaf.name][rows]
        self.told = {name: found[value] for name, value in self._values.items()}
        return logits_BSV


class _Cpu(PromotingSession, OnnxRuntimeCpuSession):
    pass


class _Cuda(PromotingSession, OnnxRuntimeCudaSession):
    pass


_CLASSES: dict[str, tuple[type[PromotingSession], dict[str, Any]]] = {
    "onnxruntime-cpu": (_Cpu, {}),
    "onnxruntime-cuda": (_Cuda, {"capture": False}),  # what a graph would not compute again could not be told
}


def open_promoting(bundle: Bundle, runtime: str, batch: int, capacity: int, wanted: Wanted, **options: Any) -> PromotingSession:
    """A session that tells values of its graph.

    Args:
        bundle: the bundle.
        runtime: `onnxruntime-cpu` or `onnxruntime-cuda`.
        batch: number of rows.
        capacity: most tokens per row.
        wanted: see `PromotingSession`.
        options: of the runtime's sessions.

    Raises:
        BundleError: the graph has no node of a name; or what the session raises.
    """
    parent, own = _CLASSES[runtime]
    made: type[PromotingSession] = type(parent.__name__, (parent,), {"wanted": dict(wanted)})
    return made(bundle, batch, capacity, **own | options)


def _promoted(path: Any, wanted: Wanted) -> tuple[bytes, dict[str, str]]:
    """The header with the wanted values as outputs, and name -> the graph's name for the value."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    nodes = {node.name: node for node in model.graph.node if node.domain == "wm"}
    outside = {"", *(item.name for item in (*model.graph.initializer, *model.graph.input))}
    values: dict[str, str] = {}
    for name, (node, place) in wanted.items():
        if node not in nodes:
            raise BundleError(f"{path}: no node named {node!r}; export the bundle again with this version")
        slots, index = (nodes[node].output, place) if place >= 0 else (nodes[node].input, -1 - place)
        if index < len(slots) and slots[index] not in outside:
            values[name] = slots[index]
    known = {value.name for value in model.graph.output}
    # Without a type: ONNX Runtime infers it.
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in dict.fromkeys(values.values()) if value not in known)
    return model.SerializeToString(), values


def _numpy(value: Any) -> Array:
    """A copy of an OrtValue on the host."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    count = value.tensor_size_in_bytes() // 2
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr())) if count else np.empty(0, np.uint16)
    return _wide(bits.reshape(value.shape()))


def _wide(bits: Array) -> Array:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
