"""A session of ONNX Runtime whose graph has values of its `wm` nodes as further outputs. Needs onnx.

B rows, T tokens, S selected tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from wm_graph.errors import BundleError
from wm_runtimes.bundle import Bundle
from wm_runtimes.onnxruntime_cpu import GRAPHS, OnnxRuntimeCpuSession
from wm_runtimes.state_buffers import StateBuffers

Array = np.ndarray[Any, np.dtype[Any]]


class PromotingSession(OnnxRuntimeCpuSession):
    """A session that tells values of the last call; the file's header is changed in memory.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.
        wanted: name -> (node name, place): output 0, 1, ... of the node, or -1, -2, ... for its first, second, ... input.
        graph: which of the bundle's ONNX files.
        options: further options of the session.

    Attributes:
        told: name -> value in the last call, of the wanted values that the graph computes: those that a node leaves out, and parameters
            and inputs of the graph, are not among them.

    Raises:
        BundleError: the graph has no node of a name; or what the session raises.
    """

    def __init__(
        self, bundle: Bundle, batch: int, capacity: int, wanted: Mapping[str, tuple[str, int]], graph: str = GRAPHS[0], **options: Any
    ) -> None:
        self.told: dict[str, Array] = {}
        self._header, self._values = _promoted(bundle, graph, wanted)
        self._states = {leaf.output: leaf.name for leaf in bundle.state}
        self._fresh = [value for value in dict.fromkeys(self._values.values()) if value not in self._states]
        super().__init__(bundle, batch, capacity, graph=graph, **options)
        self._block = capacity  # a call is one run, whose values are told

    def _source(self) -> str | bytes:
        return self._header

    def _open(self, entries: dict[str, str]) -> Any:
        return super()._open({"session.model_external_initializers_file_folder_path": str(self._path.parent), **entries})

    def _outputs(self) -> dict[str, str]:
        return {name: kind for name, kind in super()._outputs().items() if name not in self._fresh}

    def _binding(self, buffers: StateBuffers, start: int, shape: tuple[int, ...], selected: int) -> Any:
        self._last = super()._binding(buffers, start, shape, selected)  # those of large logits are not kept
        return self._last

    def _bind(self, buffers: StateBuffers, start: int, batch: int, length: int, selected: int) -> Any:
        binding = super()._bind(buffers, start, batch, length, selected)
        for value in self._fresh:
            binding.io.bind_output(value)
        return binding

    def _run_at_once(
        self, buffers: StateBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array
    ) -> Array:
        logits_BSV = super()._run_at_once(buffers, start, position_B, tokens_BT, valid_B, select_BS)
        found: dict[str, Array] = {}
        if self._fresh:
            outputs = self._last.io.get_outputs()
            found = {name: value.numpy().copy() for name, value in zip(self._fresh, outputs[-len(self._fresh) :], strict=True)}
        rows = slice(start, start + len(tokens_BT))
        found |= {value: buffers.arrays[leaf][rows].copy() for value, leaf in self._states.items() if leaf in buffers.arrays}
        self.told = {name: found[value] for name, value in self._values.items()}
        return logits_BSV


def _promoted(bundle: Bundle, graph: str, wanted: Mapping[str, tuple[str, int]]) -> tuple[bytes, dict[str, str]]:
    """The header with the wanted values as outputs, and name -> the graph's name for the value."""
    import onnx

    path = bundle.file(graph)
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
