"""Session on ONNX Runtime's CPU provider: the state stays in place, one buffer bound as input and output. Imports no torch and no onnx."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError
from wm_runtimes.bundle import Bundle, StateLeaf
from wm_runtimes.huge_pages import private_memory, use_huge_pages
from wm_runtimes.session import Array, Session, first_line
from wm_runtimes.state_buffers import StateBuffers

GRAPHS = ("model.ort.onnx", "model.onnx")
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(int64)": np.int64}
_BLOCK = 256  # tokens of one row that run at once
_KEPT_BINDINGS = 8
_KEPT_LOGITS_BYTES = 16_000_000


def availability(runtime: str = "onnxruntime-cpu") -> str | None:
    """Why this runtime cannot run here, or None."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        return 'onnxruntime is not installed; install it with `pip install "wm-graph[cpu]"`'
    return None


@dataclass(frozen=True)
class _Binding:
    """A prepared run over fixed buffers: write the inputs, run, read the logits."""

    io: Any
    tokens_BT: Array
    valid_B: Array
    select_BS: Array
    position_B: Array
    logits_BSV: Array
    copies: tuple[tuple[Array, Array], ...]  # (state rows, fresh values) of leaves that are not aliased


class OnnxRuntimeCpuSession(Session):
    """A session that runs an ONNX graph of the bundle on the CPU.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.
        graph: `model.ort.onnx` (bodies tuned for ONNX Runtime, the default) or `model.onnx` (standard ops).
        threads: intra-op threads; None leaves it to ONNX Runtime.
        prepack: let ONNX Runtime rearrange weights into a private copy, on huge pages where the kernel gives them, which makes a step
            some 10 % faster. Off, it computes from the mapped file: opening is instant (SmolLM2-135M: 0.3 s instead of 1.8 s), and
            processes share the pages.
        alias: bind one buffer to input and output of a state leaf. Off, every step copies the state, for verification.
        spin: let idle threads poll up to 1 ms for work before they sleep: longer than the gap between two nodes or two steps, which saves
            a fifth of a decode step (SmolLM2-135M, 2 cores), and no longer, so that an idle session takes no processor time. Off, they
            sleep at once, which is better where other work wants the cores.

    Raises:
        InputError: an option is malformed.
        BundleError: the graph is missing, damaged or does not fit the manifest.
        RuntimeUnavailableError: ONNX Runtime is not installed, or cannot run the bundle's dtype on CPUs.
    """

    runtime = "onnxruntime-cpu"

    def __init__(
        self,
        bundle: Bundle,
        batch: int = 1,
        capacity: int = 1024,
        *,
        graph: str = "model.ort.onnx",
        threads: int | None = None,
        prepack: bool = True,
        alias: bool = True,
        spin: bool = True,
    ) -> None:
        if reason := availability():
            raise RuntimeUnavailableError(f"{self.runtime}: {reason}")
        if bundle.dtype == "bfloat16":
            raise RuntimeUnavailableError(
                f"{self.runtime}: {bundle.path} is bfloat16, which ONNX Runtime's CPU kernels lack; export it as float32 or float16"
            )
        if graph not in GRAPHS:
            raise InputError(f"graph is {graph!r}, expected one of {', '.join(GRAPHS)}")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise InputError(f"threads is {threads!r}, expected an integer of at least 1")
        self._options: dict[str, Any] = {"threads": threads, "prepack": prepack, "spin": spin}
        self._alias = alias
        self._path = bundle.file(graph)
        before = private_memory()
        self._model = self._open({})
        if prepack:
            use_huge_pages(since=before)
        super().__init__(bundle, batch, capacity)
        self._logits_type = _NUMPY[self._check_signature()]
        # A layer's values of a block stay in the processor's cache: prefills of 512 tokens take 6 % less (SmolLM2-135M, Mamba2-115M).
        # A window is sorted anew in every run, which takes more than that (cheems-20m: 15 %). Several rows do not fit and run whole.
        self._block = capacity if any(leaf.kind == "slot" for leaf in bundle.state) else _BLOCK

    def placement(self) -> dict[str, list[str]]:
        """Execution provider -> names of its nodes, after ONNX Runtime's optimisation. Opens the model a second time."""
        self._check_open()
        recording = self._open({"session.record_ep_graph_assignment_info": "1"})
        placed: dict[str, list[str]] = {}
        for part in recording.get_provider_graph_assignment_info():
            placed.setdefault(part.ep_name, []).extend(node.name for node in part.get_nodes())
        return placed

    def close(self) -> None:
        """Free the state and the model; later calls are refused."""
        super().close()
        self._model = None

    def _open(self, entries: dict[str, str]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure comes as an exception; the log would repeat it over many lines
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        if self._options["threads"] is not None:
            options.intra_op_num_threads = self._options["threads"]
        if not self._options["prepack"]:
            options.add_session_config_entry("session.disable_prepacking", "1")
        spin = {"session.intra_op.spin_duration_us": "1000"} if self._options["spin"] else {"session.intra_op.allow_spinning": "0"}
        for key, value in {**spin, **entries}.items():
            options.add_session_config_entry(key, value)
        try:
            return onnxruntime.InferenceSession(self._source(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(f"{self._path}: ONNX Runtime cannot open it: {first_line(error)}; export the bundle again") from error

    def _source(self) -> str | bytes:
        """What ONNX Runtime opens: the file, or a header in memory."""
        return str(self._path)

    def _outputs(self) -> dict[str, str]:
        """Name -> type of the outputs that every graph of a bundle has."""
        return {node.name: node.type for node in self._model.get_outputs()}

    def _check_signature(self) -> str:
        """Compare the graph's inputs and outputs with the manifest; returns the type of the logits."""
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
            if (found_type := _NUMPY.get(inputs[leaf.name])) is None or np.dtype(found_type).name != leaf.dtype:
                raise BundleError(
                    f"{self._path}: state {leaf.name!r} is {inputs[leaf.name]}, manifest.json says {leaf.dtype}; export again"
                )
        if outputs["logits"] not in _NUMPY:
            raise BundleError(f"{self._path}: logits are {outputs['logits']}, expected floats; export the bundle again")
        return str(outputs["logits"])

    def _run(self, buffers: StateBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
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

    def _run_at_once(
        self, buffers: StateBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array
    ) -> Array:
        binding = self._binding(buffers, start, tokens_BT.shape, select_BS.shape[1])
        binding.tokens_BT[...] = tokens_BT
        binding.valid_B[...] = valid_B
        binding.select_BS[...] = select_BS
        binding.position_B[...] = position_B
        self._model.run_with_iobinding(binding.io)
        for state, fresh in binding.copies:
            state[...] = fresh
        return binding.logits_BSV.astype(np.float32)

    def _binding(self, buffers: StateBuffers, start: int, shape: tuple[int, ...], selected: int) -> _Binding:
        """A prepared run, from the few kept with the buffers where this shape was run before."""
        kept: OrderedDict[tuple[int, ...], _Binding] = buffers.bindings.setdefault(self.runtime, OrderedDict())
        key = (start, *shape, selected)
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        binding = self._bind(buffers, start, shape[0], shape[1], selected)
        if binding.logits_BSV.nbytes <= _KEPT_LOGITS_BYTES:
            kept[key] = binding
            if len(kept) > _KEPT_BINDINGS:
                kept.popitem(last=False)
        return binding

    def _bind(self, buffers: StateBuffers, start: int, batch: int, length: int, selected: int) -> _Binding:
        io = self._model.io_binding()
        inputs = {
            "tokens": np.zeros((batch, length), np.int64),
            "valid": np.zeros(batch, np.int64),
            "select": np.zeros((batch, selected), np.int64),
            "position": np.zeros(batch, np.int64),
        }
        for name, array in inputs.items():
            io.bind_ortvalue_input(name, _value(array))
        logits_BSV = np.zeros((batch, selected, self.bundle.limits.vocab_size), self._logits_type)
        io.bind_ortvalue_output("logits", _value(logits_BSV))
        copies = []
        for leaf in self.bundle.state:
            if leaf.name == "position":
                io.bind_ortvalue_output(leaf.output, _value(np.zeros(batch, np.int64)))
            elif (pair := self._bind_leaf(io, leaf, buffers.arrays[leaf.name][start : start + batch])) is not None:
                copies.append(pair)
        return _Binding(io, inputs["tokens"], inputs["valid"], inputs["select"], inputs["position"], logits_BSV, tuple(copies))

    def _bind_leaf(self, io: Any, leaf: StateLeaf, state: Array) -> tuple[Array, Array] | None:
        value = _value(state)
        io.bind_ortvalue_input(leaf.name, value)
        if self._alias and leaf.alias:
            io.bind_ortvalue_output(leaf.output, value)
            return None
        fresh = np.empty_like(state)
        io.bind_ortvalue_output(leaf.output, _value(fresh))
        return state, fresh


def _value(array: Array) -> Any:
    """An OrtValue over the array's own memory, which it keeps alive."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array)
