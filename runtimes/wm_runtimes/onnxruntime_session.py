"""What sessions on ONNX Runtime share: a graph of the bundle, opened and compared with the manifest. Imports no torch and no onnx.

B rows, T tokens, S selected tokens, V vocabulary.
"""

from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wm_graph.errors import BundleError
from wm_runtimes.bundle import Bundle
from wm_runtimes.session import Array, Session, first_line
from wm_runtimes.state_buffers import Buffers

GRAPHS = ("model.ort.onnx", "model.onnx", "model.cuda.onnx")
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
}
KEPT_BINDINGS = 8
KEPT_LOGITS_BYTES = 16_000_000


class Binding(Protocol):
    """A prepared run over fixed memory."""

    io: Any

    @property
    def logits_bytes(self) -> int:
        """Memory of its logits."""


class OnnxRuntimeSession(Session):
    """A session that runs an ONNX graph of the bundle.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.
        graph: which of the bundle's ONNX files.

    Raises:
        BundleError: the graph is missing, damaged or does not fit the manifest.
    """

    def __init__(self, bundle: Bundle, batch: int, capacity: int, graph: str) -> None:
        self._path: Path = bundle.file(graph)
        self._model = self._open({})
        super().__init__(bundle, batch, capacity)
        self._logits_dtype = self._check_signature()
        self._block = capacity

    def placement(self) -> dict[str, list[str]]:
        """Execution provider -> names of its nodes, after ONNX Runtime's optimisation. Opens the model a second time."""
        self._check_open()
        placed: dict[str, list[str]] = {}
        for provider, node in assigned_nodes(self._open(RECORD_PLACEMENT)):
            placed.setdefault(provider, []).append(node.name)
        return placed

    def close(self) -> None:
        """Free the state and the model; later calls are refused."""
        super().close()
        self._model = None

    @abstractmethod
    def _session_options(self) -> Any:
        """Options of ONNX Runtime."""

    @abstractmethod
    def _providers(self) -> list[Any]:
        """Execution providers as ONNX Runtime takes them."""

    @abstractmethod
    def _bind(self, buffers: Any, start: int, batch: int, length: int, selected: int) -> Any:
        """Prepare a run of `batch` rows from `start` on."""
        raise NotImplementedError

    @abstractmethod
    def _run_at_once(self, buffers: Any, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        """One run of the graph; see `Session._run`."""
        raise NotImplementedError

    def _open(self, entries: dict[str, str]) -> Any:
        import onnxruntime

        options = self._session_options()
        options.log_severity_level = 4  # a failure comes as an exception; the log would repeat it over many lines
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            return onnxruntime.InferenceSession(self._source(), options, providers=self._providers())
        except Exception as error:
            raise BundleError(f"{self._path}: ONNX Runtime cannot open it: {first_line(error)}; export the bundle again") from error

    def _source(self) -> str | bytes:
        """What ONNX Runtime opens: the file, or a header in memory."""
        return str(self._path)

    def _outputs(self) -> dict[str, str]:
        """Name -> type of the outputs that every graph of a bundle has."""
        return {node.name: node.type for node in self._model.get_outputs()}

    def _check_signature(self) -> str:
        """Compare the graph's inputs and outputs with the manifest; returns the dtype of the logits."""
        inputs = {node.name: node.type for node in self._model.get_inputs()}
        outputs = self._outputs()
        leaves = self.bundle.state
        for what, found, expected in (
            ("inputs", inputs, ["tokens", "valid", "select", *(leaf.name for leaf in leaves)]),
            ("outputs", outputs, ["logits", *(leaf.output for leaf in leaves)]),
        ):
            if odd := sorted(set(found) ^ set(expected)):
                raise BundleError(f"{self._path}: {what} and manifest.json disagree about {odd[0]!r} ({len(odd)} in all); export again")
        for leaf in leaves:
            if DTYPES.get(inputs[leaf.name]) != leaf.dtype:
                raise BundleError(
                    f"{self._path}: state {leaf.name!r} is {inputs[leaf.name]}, manifest.json says {leaf.dtype}; export again"
                )
        dtype = DTYPES.get(outputs["logits"], "")
        if dtype not in ("float32", "float16", "float64"):
            raise BundleError(f"{self._path}: logits are {outputs['logits']}, expected floats; export the bundle again")
        return dtype

    def _run(self, buffers: Buffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        length = tokens_BT.shape[1]
        if length <= self._block or len(tokens_BT) > 1:
            return self._run_at_once(buffers, start, position_B, tokens_BT, valid_B, select_BS)
        logits_BSV = np.zeros((*select_BS.shape, self.bundle.limits.vocab_size), np.float32)
        for first in range(0, length, self._block):
            part_BT = tokens_BT[:, first : first + self._block]
            inside_BS = (select_BS >= first) & (select_BS < first + part_BT.shape[1])
            part_select_BS = (select_BS - first)[inside_BS][None]
            part_valid_B = np.clip(valid_B - first, 0, part_BT.shape[1])
            logits_BSV[inside_BS] = self._run_at_once(buffers, start, position_B + first, part_BT, part_valid_B, part_select_BS)[0]
        return logits_BSV

    def _binding(self, buffers: Buffers, start: int, shape: tuple[int, ...], selected: int) -> Any:
        """A prepared run, from the few kept with the buffers where this shape was run before."""
        kept: OrderedDict[tuple[int, ...], Binding] = buffers.bindings.setdefault(self.runtime, OrderedDict())
        key = (start, *shape, selected)
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        binding: Binding = self._bind(buffers, start, shape[0], shape[1], selected)
        if binding.logits_bytes <= KEPT_LOGITS_BYTES:
            kept[key] = binding
            if len(kept) > KEPT_BINDINGS:
                kept.popitem(last=False)
        return binding


RECORD_PLACEMENT = {"session.record_ep_graph_assignment_info": "1"}


def assigned_nodes(model: Any) -> list[tuple[str, Any]]:
    """(execution provider, node) of a model that was opened with `RECORD_PLACEMENT`; a node has `name`, `op_type` and `domain`."""
    return [(part.ep_name, node) for part in model.get_provider_graph_assignment_info() for node in part.get_nodes()]
