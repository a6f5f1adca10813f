"""Session on ONNX Runtime's CPU provider: the state stays in place, one buffer bound as input and output. Imports no torch and no onnx."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from wm_graph.errors import InputError, RuntimeUnavailableError
from wm_runtimes.bundle import Bundle, StateLeaf
from wm_runtimes.huge_pages import private_memory, use_huge_pages
from wm_runtimes.onnxruntime_session import GRAPHS, OnnxRuntimeSession
from wm_runtimes.session import Array
from wm_runtimes.state_buffers import StateBuffers

PROVIDER = "CPUExecutionProvider"
_BLOCK = 256  # tokens of one row that run at once


def availability(runtime: str = "onnxruntime-cpu") -> str | None:
    """Why this runtime cannot run here, or None."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        return 'onnxruntime is not installed; install it with `pip install "wm-graph[cpu]"`'
    try:
        import onnxruntime
    except ImportError as error:
        return f'onnxruntime cannot be imported ({error}); install it again with `pip install "wm-graph[cpu]"`'
    if PROVIDER not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime has no {PROVIDER}; install another build of it"
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

    @property
    def logits_bytes(self) -> int:
        """See `onnxruntime_session.Binding`."""
        return self.logits_BSV.nbytes


class OnnxRuntimeCpuSession(OnnxRuntimeSession):
    """A session that runs an ONNX graph of the bundle on the CPU.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.
        graph: `model.ort.onnx` (bodies tuned for ONNX Runtime, the default), `model.onnx` (standard ops) or `model.cuda.onnx` (for GPUs).
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
        before = private_memory()
        super().__init__(bundle, batch, capacity, graph)
        if prepack:
            use_huge_pages(since=before)
        # A layer's values of a block stay in the processor's cache: prefills of 512 tokens take 6 % less (SmolLM2-135M, Mamba2-115M).
        # A window is sorted anew in every run, which takes more than that (cheems-20m: 15 %). Several rows do not fit and run whole.
        self._block = capacity if any(leaf.kind == "slot" for leaf in bundle.state) else _BLOCK

    def _session_options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if self._options["threads"] is not None:
            options.intra_op_num_threads = self._options["threads"]
        if not self._options["prepack"]:
            options.add_session_config_entry("session.disable_prepacking", "1")
        spin = {"session.intra_op.spin_duration_us": "1000"} if self._options["spin"] else {"session.intra_op.allow_spinning": "0"}
        for key, value in spin.items():
            options.add_session_config_entry(key, value)
        return options

    def _providers(self) -> list[Any]:
        return [PROVIDER]

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
        logits_BSV = np.zeros((batch, selected, self.bundle.limits.vocab_size), self._logits_dtype)
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
