"""libwm_kernels from Python: a bundle's native kernels called on device memory, with no Triton and no torch.

The library is built by `make cpp`. Tensors are addresses: whoever calls owns the memory, the CUDA context and the stream.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError, WmError

__all__ = ["DTYPES", "DeviceTensor", "NativeKernels", "NativeOp", "find_library"]

LIBRARY = "WM_KERNELS_LIBRARY"  # names the library, where it is not in the checkout's build/cpp
ABI_VERSION = 1
MAX_RANK = 8
DTYPES = ("absent", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")  # by wmk_dtype
_ERRORS: dict[int, type[WmError]] = {1: BundleError, 2: InputError, 3: RuntimeUnavailableError}


class _Argument(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("text", ctypes.c_char_p), ("integer", ctypes.c_int64))


class _Query(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_char_p),
        ("arguments", ctypes.POINTER(_Argument)),
        ("argument_count", ctypes.c_size_t),
        ("input_dtypes", ctypes.POINTER(ctypes.c_int32)),
        ("input_count", ctypes.c_size_t),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("shape", ctypes.POINTER(ctypes.c_int64)), ("rank", ctypes.c_int32), ("dtype", ctypes.c_int32))


class _Layout(ctypes.Structure):
    _fields_ = (("shape", ctypes.c_int64 * MAX_RANK), ("rank", ctypes.c_int32), ("dtype", ctypes.c_int32))


class _Call(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.POINTER(_Tensor)),
        ("input_count", ctypes.c_size_t),
        ("outputs", ctypes.POINTER(_Tensor)),
        ("output_count", ctypes.c_size_t),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor on the device.

    Attributes:
        address: of its first element; 0 is allowed where there is none.
        shape: its dimensions.
        dtype: one of `DTYPES`.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Any) -> DeviceTensor:
        """The memory of a torch tensor, which must live as long as calls of it run.

        Raises:
            InputError: it is not contiguous.
        """
        if not tensor.is_contiguous():
            raise InputError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous; native kernels take contiguous ones")
        return cls(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def find_library(name: str = "libwm_kernels.so") -> Path:
    """A built library: beside what the environment variable WM_KERNELS_LIBRARY names, else that of the checkout's build/cpp.

    Args:
        name: `libwm_kernels.so`, or `libwm_kernels_onnxruntime.so` for ONNX Runtime's ops.

    Raises:
        RuntimeUnavailableError: there is none.
    """
    named = os.environ.get(LIBRARY)
    path = Path(named) if named else Path(__file__).parents[2] / "build" / "cpp" / "libwm_kernels.so"
    if name != "libwm_kernels.so":
        path = path.with_name(name)
    if not path.is_file():
        raise RuntimeUnavailableError(f"{path} is not there; build it with make cpp, or name libwm_kernels.so beside it in {LIBRARY}")
    return path


def check_library() -> None:
    """Find the library and load it.

    Raises:
        RuntimeUnavailableError: it is not there, cannot be loaded, or is of another version.
    """
    _load(find_library())


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeUnavailableError(f"{path} cannot be loaded ({error}); build it here with make cpp") from error
    version = library.wmk_abi_version()
    if version != ABI_VERSION:
        raise RuntimeUnavailableError(f"{path} has ABI version {version}, expected {ABI_VERSION}; build it again with make cpp")
    library.wmk_last_error.restype = ctypes.c_char_p
    library.wmk_output_count.restype = ctypes.c_size_t
    # Handles are pointers: undeclared, they would be cut to 32 bits.
    pointer = ctypes.c_void_p
    tensors, size = ctypes.POINTER(_Tensor), ctypes.c_size_t
    library.wmk_open.argtypes = (ctypes.c_char_p, ctypes.POINTER(pointer))
    library.wmk_find.argtypes = (pointer, ctypes.POINTER(_Query), ctypes.POINTER(pointer))
    library.wmk_output_layouts.argtypes = (pointer, tensors, size, ctypes.POINTER(_Layout), size)
    library.wmk_scratch_bytes.argtypes = (pointer, ctypes.POINTER(_Call), ctypes.c_char_p, ctypes.POINTER(size))
    library.wmk_launch.argtypes = (pointer, ctypes.POINTER(_Call))
    for name in ("wmk_close", "wmk_release", "wmk_verify", "wmk_load", "wmk_output_count"):
        getattr(library, name).argtypes = (pointer,)
    return library


class NativeKernels:
    """The folder `kernels/` of a bundle, opened and checked; a context manager that closes it.

    Raises:
        BundleError: plans.json is missing or damaged; the line names the place.
        RuntimeUnavailableError: the library is not built.
    """

    def __init__(self, folder: str | os.PathLike[str], library: Path | None = None) -> None:
        self._library = _load(library or find_library())
        self._handle = ctypes.c_void_p()
        self._check(self._library.wmk_open(os.fsencode(folder), ctypes.byref(self._handle)))

    def __enter__(self) -> NativeKernels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder; its ops must be closed before."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        self._library.wmk_close(handle)

    def verify(self) -> None:
        """Compare the size and SHA-256 of every cubin.

        Raises:
            BundleError: one is missing or damaged.
        """
        self._check(self._library.wmk_verify(self._handle))

    def op(self, name: str, arguments: Mapping[str, int | float | str], dtypes: Sequence[str | None]) -> NativeOp:
        """The entries that serve calls of an op.

        Args:
            name: as `wm::ssd_scan`.
            arguments: its plain arguments.
            dtypes: of all its inputs in order; None for one that is absent.

        Raises:
            InputError: no entry has these arguments, dtypes and absent inputs.
        """
        made = (_Argument * len(arguments))(*(_argument(key, value) for key, value in arguments.items()))
        numbers = (ctypes.c_int32 * len(dtypes))(*(DTYPES.index(dtype or "absent") for dtype in dtypes))
        query = _Query(name.encode(), made, len(made), numbers, len(numbers))
        handle = ctypes.c_void_p()
        self._check(self._library.wmk_find(self._handle, ctypes.byref(query), ctypes.byref(handle)))
        return NativeOp(self, handle)

    def _check(self, status: int) -> None:
        if status:
            raise _ERRORS.get(status, WmError)(self._library.wmk_last_error().decode(errors="replace"))


class NativeOp:
    """Calls of one op; a context manager that releases it. Made by `NativeKernels.op`."""

    def __init__(self, kernels: NativeKernels, handle: ctypes.c_void_p) -> None:
        self._kernels = kernels
        self._library = kernels._library
        self._handle = handle

    def __enter__(self) -> NativeOp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the op."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        self._library.wmk_release(handle)

    def load(self) -> None:
        """Load the kernels of all variants into the current context, as a capture needs it.

        Raises:
            BundleError: a cubin is damaged.
            RuntimeUnavailableError: there is no CUDA, no current context, or no kernel for its device.
        """
        self._kernels._check(self._library.wmk_load(self._handle))

    def layouts(self, inputs: Sequence[DeviceTensor | None]) -> list[tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every output; addresses are not looked at.

        Raises:
            InputError: the shapes do not fit.
        """
        layouts = (_Layout * self._library.wmk_output_count(self._handle))()
        tensors = _tensors(inputs)
        self._kernels._check(self._library.wmk_output_layouts(self._handle, tensors, len(inputs), layouts, len(layouts)))
        return [(DTYPES[layout.dtype], tuple(layout.shape[: layout.rank])) for layout in layouts]

    def scratch_bytes(self, inputs: Sequence[DeviceTensor | None], outputs: Sequence[DeviceTensor], architecture: str | None = None) -> int:
        """Bytes of scratch that a call needs, on `architecture` ("sm_90"), or where None on the current context's device.

        Raises:
            InputError: no variant serves the call.
            RuntimeUnavailableError: no architecture is given and there is no CUDA or no current context.
        """
        size = ctypes.c_size_t()
        call = _call(inputs, outputs)
        named = None if architecture is None else architecture.encode()
        self._kernels._check(self._library.wmk_scratch_bytes(self._handle, ctypes.byref(call), named, ctypes.byref(size)))
        return size.value

    def launch(
        self,
        inputs: Sequence[DeviceTensor | None],
        outputs: Sequence[DeviceTensor],
        scratch: int = 0,
        scratch_bytes: int = 0,
        stream: int = 0,
    ) -> None:
        """Launch a call on a stream of the current context; an output with the address of its state's input is updated in place.

        Args:
            inputs: in the op's order; None for one that is absent.
            outputs: in the op's order, of the shapes that `layouts` gives.
            scratch: address of memory for the call, aligned to 256 bytes.
            scratch_bytes: its length, at least that of the method `scratch_bytes`.
            stream: a CUstream; 0 is the default one.

        Raises:
            InputError: the call does not fit the plans; nothing was launched.
            BundleError: a cubin is damaged; nothing was launched.
            RuntimeUnavailableError: there is no CUDA, no current context, or no kernel for its device.
            WmError: the driver refuses it.
        """
        call = _call(inputs, outputs, scratch, scratch_bytes, stream)
        self._kernels._check(self._library.wmk_launch(self._handle, ctypes.byref(call)))


def _argument(name: str, value: int | float | str) -> _Argument:
    if isinstance(value, int):
        return _Argument(name.encode(), None, int(value))
    return _Argument(name.encode(), (value if isinstance(value, str) else repr(value)).encode(), 0)


def _tensors(tensors: Sequence[DeviceTensor | None]) -> Any:
    return (_Tensor * len(tensors))(*(_Tensor() if tensor is None else _tensor(tensor) for tensor in tensors))


def _tensor(tensor: DeviceTensor) -> _Tensor:
    shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
    return _Tensor(tensor.address, shape, len(tensor.shape), DTYPES.index(tensor.dtype))


def _call(
    inputs: Sequence[DeviceTensor | None], outputs: Sequence[DeviceTensor], scratch: int = 0, scratch_bytes: int = 0, stream: int = 0
) -> _Call:
    return _Call(_tensors(inputs), len(inputs), _tensors(outputs), len(outputs), scratch, scratch_bytes, stream)
