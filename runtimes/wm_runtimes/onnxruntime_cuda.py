"""Session on ONNX Runtime's CUDA provider: everything stays on the GPU, and decode steps replay as CUDA graphs. Imports no torch, no onnx.

B rows, T tokens, S selected tokens, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError
from wm_runtimes.bundle import Bundle
from wm_runtimes.cuda_device import CudaDevice, cuda_device, kernels_reason, load_libraries, native_of, ops_without_kernels
from wm_runtimes.cuda_graphs import CapturedSteps
from wm_runtimes.device_buffers import ALIGNMENT, ONNX_TYPES, Device, DeviceBuffers
from wm_runtimes.native_kernels import find_library
from wm_runtimes.onnxruntime_session import GRAPHS, RECORD_PLACEMENT, OnnxRuntimeSession, assigned_nodes
from wm_runtimes.session import Array

PROVIDER = "CUDAExecutionProvider"
TUNED = "model.cuda.onnx"
LIBRARY = "libwm_kernels_onnxruntime.so"
INSTALL = 'install it with `pip install "wm-graph[gpu]"`'
# What ONNX Runtime computes on the host because it is of sizes alone; anything else there is a tensor that left the GPU.
# fmt: off
HOST_OPS = frozenset((
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater", "GreaterOrEqual",
    "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
    "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
))
# fmt: on
_BODY_BLOCK = 4096  # tokens of one row that run at once on bodies, whose memory grows with tokens times keys
_LONG = ALIGNMENT // 8  # int64 per aligned part


def availability(runtime: str = "onnxruntime-cuda") -> str | None:
    """Why this runtime cannot run here, or None."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        return f"onnxruntime-gpu is not installed; {INSTALL}"
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error}); {INSTALL}"
    if PROVIDER not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime is built for CPUs; uninstall it, and {INSTALL.replace('it', 'onnxruntime-gpu', 1)}"
    try:
        cuda_device()
    except RuntimeUnavailableError as error:
        return str(error)
    if missing := load_libraries(_libraries(onnxruntime.cuda_version)):
        return f"{missing} of CUDA {onnxruntime.cuda_version} is missing; {INSTALL}, or CUDA and cuDNN themselves"
    return None


def bundle_reason(bundle: Bundle, kernels: bool | None = None, device: int = 0) -> str | None:
    """Why this runtime cannot run a bundle here, or None; see `OnnxRuntimeCudaSession` for `kernels`.

    Raises:
        BundleError: the manifest is malformed.
    """
    try:
        _kernels_wanted(bundle, kernels, cuda_device(device))
    except RuntimeUnavailableError as error:
        return str(error)
    return None


def _libraries(version: str) -> list[str]:
    """Libraries of CUDA that the provider is linked with, and cuDNN, whose reductions bodies use; each after those that it needs."""
    major = version.split(".")[0]
    rest = ["libcufft.so.11"] if major == "12" else []
    return [f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}", "libcurand.so.10", *rest, "libcudnn.so.9"]


def _kernels_wanted(bundle: Bundle, kernels: bool | None, device: CudaDevice) -> bool:
    """Whether native kernels are to run.

    Raises:
        RuntimeUnavailableError: they are, and cannot.
    """
    if kernels is False or (kernels is None and native_of(bundle.manifest) is None):
        return False
    if reason := kernels_reason(bundle.manifest, device):
        raise RuntimeUnavailableError(f"{reason}, or run the bodies: onnxruntime-cuda:bodies")
    if kernels and (bare := ops_without_kernels(bundle.manifest)):
        raise RuntimeUnavailableError(
            f"{', '.join(bare)} has no native kernel for this model; onnxruntime-cuda without :kernels runs its body beside other kernels"
        )
    find_library(LIBRARY)
    return True


@dataclass
class _Binding:
    """A prepared run over fixed memory of the GPU.

    Attributes:
        io: ONNX Runtime's binding.
        host: the inputs on the host, one array behind `parts`.
        parts: input -> its part of `host`.
        inputs: the same memory on the GPU.
        logits_BSV: on the GPU.
        rows: first row and number of rows.
        is_step: one token and one logit a row, which may be replayed.
        copies: (leaf, fresh values on the GPU) of leaves that are not aliased.
        graphs: thread -> number of the captured graph, None where there is none; see `CapturedSteps`.
        kept: what must live as long as the binding.
    """

    io: Any
    host: Array
    parts: dict[str, Array]
    inputs: Any
    logits_BSV: Any
    rows: tuple[int, int]
    is_step: bool
    copies: list[tuple[str, Any]] = field(default_factory=list)
    graphs: dict[int, str | None] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    @property
    def logits_bytes(self) -> int:
        """See `onnxruntime_session.Binding`."""
        return int(self.logits_BSV.tensor_size_in_bytes())


class OnnxRuntimeCudaSession(OnnxRuntimeSession):
    """A session that runs an ONNX graph of the bundle on a GPU: tokens, state and logits are bound there.

    Every node runs on the GPU, but for those that compute sizes; a graph that ONNX Runtime would place otherwise is refused. A decode step
    over rows where they are is captured as a CUDA graph when it first runs, from a copy of the state, and replayed from then on if the
    replay gave the bits of the plain run.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.
        kernels: run the native kernels of the bundle, which must be there for every op; False runs the bodies of the
            ONNX functions; None runs all kernels of a bundle that has some, the bodies of its other ops, and those of a bundle without any.
        graph: `model.cuda.onnx` (the default, of fewer nodes), `model.onnx` (the default where a bundle lacks the former) or
            `model.ort.onnx`, whose bodies are tuned for CPUs.
        capture: replay decode steps as CUDA graphs, where ONNX Runtime can; off, every step is launched node by node.
        alias: bind one memory to input and output of a state leaf. Off, every step copies the state, for verification.
        device: number of the GPU.

    Attributes:
        kernels: whether native kernels run.
        steps: the captured steps, and why there are none.

    Raises:
        InputError: an option is malformed.
        BundleError: the graph is missing, damaged or does not fit the manifest.
        CapacityError: the GPU has no memory for the state.
        RuntimeUnavailableError: ONNX Runtime, its CUDA provider or a GPU is missing, the bundle's kernels are for others, or a node would
            run on the host.
    """

    runtime = "onnxruntime-cuda"
    _kind, _provider = "cuda", PROVIDER

    def __init__(
        self,
        bundle: Bundle,
        batch: int = 1,
        capacity: int = 1024,
        *,
        kernels: bool | None = None,
        graph: str | None = None,
        capture: bool = True,
        alias: bool = True,
        device: int = 0,
    ) -> None:
        graph = graph or (TUNED if TUNED in bundle.files else "model.onnx")
        if graph not in GRAPHS:
            raise InputError(f"graph is {graph!r}, expected one of {', '.join(GRAPHS)}")
        if type(device) is not int or device < 0:
            raise InputError(f"device is {device!r}, expected the number of a GPU, from 0")
        self.kernels = self._prepare(bundle, kernels, device)
        self._kernels_folder = bundle.path / "kernels"
        self._alias, self._number = alias, device
        self.steps = CapturedSteps(wanted=capture and alias)
        super().__init__(bundle, batch, capacity, graph)
        if not self.kernels:
            self._block = _BODY_BLOCK

    def placement(self) -> dict[str, list[str]]:
        """Execution provider -> names of its nodes, after ONNX Runtime's optimisation."""
        self._check_open()
        placed: dict[str, list[str]] = {}
        for provider, node in assigned_nodes(self._model):
            placed.setdefault(provider, []).append(node.name)
        return placed

    def close(self) -> None:
        """Free the state and the model; later calls are refused."""
        super().close()
        self._memory: Device | None = None

    def _prepare(self, bundle: Bundle, kernels: bool | None, device: int) -> bool:
        """Whether native kernels run; what is missing is said before anything is opened."""
        if reason := availability():
            raise RuntimeUnavailableError(f"{self.runtime}: {reason}")
        try:
            return _kernels_wanted(bundle, kernels, cuda_device(device))
        except RuntimeUnavailableError as error:
            raise RuntimeUnavailableError(f"{self.runtime}: {bundle.path}: {error}") from error

    def _session_options(self) -> Any:
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)  # no remark in every session that providers could be plug-ins; errors stay
        options = onnxruntime.SessionOptions()
        if self.kernels:
            options.add_session_config_entry("wm.kernels", str(self._kernels_folder))
            options.add_session_config_entry("wm.kernels.required", "1")
            options.register_custom_ops_library(str(find_library(LIBRARY)))
        return options

    def _providers(self) -> list[Any]:
        options = {
            "device_id": str(self._number),
            "use_tf32": "0",  # it would round the products of float32 models to 10 bits
            "arena_extend_strategy": "kSameAsRequested",  # doubling would hold up to twice the weights
        }
        if self.steps.wanted:
            options["enable_cuda_graph"] = "1"
        return [(PROVIDER, options)]

    def _open(self, entries: dict[str, str]) -> Any:
        """The model; once more without graphs where ONNX Runtime cannot capture it."""
        try:
            model = super()._open(RECORD_PLACEMENT | entries)
        except BundleError as error:
            if not self.steps.wanted or "graph capture" not in str(error):
                raise
            why = str(error).rpartition("as requested by the user")[2].removesuffix("; export the bundle again")
            self.steps.refuse(f"ONNX Runtime cannot capture this graph, {why}")
            model = super()._open(RECORD_PLACEMENT | entries)
        self._check_placement(model)
        self._memory = Device(model, self._kind, self._number)
        return model

    def _check_placement(self, model: Any) -> None:
        if model.get_providers()[0] != self._provider:
            raise RuntimeUnavailableError(
                f"{self.runtime}: ONNX Runtime's CUDA provider does not start here; `wm doctor` says what is missing"
            )
        astray = [f"{node.name} ({node.op_type})" for provider, node in assigned_nodes(model) if not self._belongs(provider, node)]
        if astray:
            raise RuntimeUnavailableError(
                f"{self.runtime}: {self._path}: {len(astray)} nodes would not run on the GPU: {', '.join(astray[:4])}; "
                "export the bundle again with this version, or use another graph"
            )

    def _belongs(self, provider: str, node: Any) -> bool:
        return provider == self._provider or (node.domain == "" and node.op_type in HOST_OPS)

    def _make_buffers(self, batch: int) -> DeviceBuffers:
        assert self._memory is not None
        window = self.bundle.config.keep_window
        return DeviceBuffers(self._memory, self.bundle.state, batch, self.capacity, window, whole_windows=self.kernels)

    def _runs_from(self, start: int) -> bool:
        buffers = self._buffers
        assert isinstance(buffers, DeviceBuffers)
        return start == 0 or buffers.rows_are_aligned

    def _run_at_once(
        self, buffers: DeviceBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array
    ) -> Array:
        binding = self._binding(buffers, start, tokens_BT.shape, select_BS.shape[1])
        for name, array in (("tokens", tokens_BT), ("valid", valid_B), ("select", select_BS), ("position", position_B)):
            binding.parts[name][...] = array
        binding.inputs.update_inplace(binding.host)
        if binding.is_step and buffers is self._buffers:
            self.steps.run(self._model, binding, buffers, self.capacity)
        else:
            self.steps.run_plainly(self._model, binding)
        for name, fresh in binding.copies:
            buffers.write(name, start, fresh.numpy())
        logits_BSV: Array = binding.logits_BSV.numpy()  # from a GPU it is a copy, on the host the memory of the next call's
        return logits_BSV.astype(np.float32, copy=self._kind == "cpu")

    def _bind(self, buffers: DeviceBuffers, start: int, batch: int, length: int, selected: int) -> _Binding:
        assert self._memory is not None
        memory, io = self._memory, self._model.io_binding()
        shapes = {"tokens": (batch, length), "valid": (batch,), "select": (batch, selected), "position": (batch,)}
        host, parts, offsets = _joined(shapes)
        inputs = memory.empty(host.shape, np.int64)
        # Allocators promise less than this alignment: the block is one part longer than its parts.
        shift = -inputs.data_ptr() // 8 % _LONG
        for name, shape in shapes.items():
            parts[name] = host[shift + offsets[name] :][: parts[name].size].reshape(shape)
            io.bind_input(name, self._kind, self._number, np.int64, list(shape), inputs.data_ptr() + 8 * (shift + offsets[name]))
        logits_BSV = memory.empty((batch, selected, self.bundle.limits.vocab_size), np.dtype(self._logits_dtype).type)
        io.bind_ortvalue_output("logits", logits_BSV)
        binding = _Binding(io, host, parts, inputs, logits_BSV, (start, batch), length == selected == 1)
        for leaf in self.bundle.state:
            if leaf.name == "position":
                binding.kept.append(memory.empty((batch,), np.int64))
                io.bind_ortvalue_output(leaf.output, binding.kept[-1])
                continue
            place, kind = buffers.places[leaf.name].rows(start, batch), ONNX_TYPES[leaf.dtype]
            io.bind_input(leaf.name, self._kind, self._number, kind, list(place.shape), place.address)
            address = place.address
            if not (self._alias and leaf.alias):
                fresh = memory.empty(place.shape, place.dtype)
                binding.copies.append((leaf.name, fresh))
                address = fresh.data_ptr()
            io.bind_output(leaf.output, self._kind, self._number, kind, list(place.shape), address)
        return binding


def _joined(shapes: dict[str, tuple[int, ...]]) -> tuple[Array, dict[str, Array], dict[str, int]]:
    """One int64 array with an aligned part for each shape, and room to align its start; the parts, and where they begin."""
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    rooms = [-(-size // _LONG) * _LONG for size in sizes.values()]
    host = np.zeros(sum(rooms) + _LONG, np.int64)
    offsets = dict(zip(shapes, np.cumsum([0, *rooms[:-1]]).tolist(), strict=True))
    return host, {name: host[offsets[name] :][: sizes[name]] for name in shapes}, offsets
