"""NVIDIA GPUs as the driver tells them, the CUDA libraries of Python packages, and which compiled kernels run where. Needs no torch."""

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wm_graph.errors import BundleError, RuntimeUnavailableError

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NAME_BYTES = 256


@dataclass(frozen=True)
class CudaDevice:
    """A GPU.

    Attributes:
        number: as CUDA counts them.
        name: as the driver says it.
        major: of the compute capability.
        minor: of the compute capability.
    """

    number: int
    name: str
    major: int
    minor: int

    @property
    def architecture(self) -> str:
        """`sm_90` for compute capability 9.0."""
        return f"sm_{self.major}{self.minor}"

    def kernels_of(self, architectures: Iterable[str]) -> str | None:
        """The architecture, of those that kernels are compiled for, whose kernels this GPU runs.

        Its own; of capability 8 also the highest below it. Kernels of 9 and later are compiled for one architecture alone.
        """
        names = set(architectures)
        if self.architecture in names or self.major != 8:
            return self.architecture if self.architecture in names else None
        return max((name for name in names if len(name) == 5 and "sm_80" <= name < self.architecture), default=None)


def cuda_device(number: int = 0) -> CudaDevice:
    """A GPU by its number.

    Raises:
        RuntimeUnavailableError: there is no driver, or no such GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeUnavailableError("no CUDA driver (libcuda.so.1) is here; it needs an NVIDIA GPU with its driver") from error
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if (result := driver.cuInit(0)) != 0 or (result := driver.cuDeviceGetCount(ctypes.byref(count))) != 0:
        raise RuntimeUnavailableError(f"the CUDA driver fails with error {result}; nvidia-smi tells whether there is a GPU")
    if not 0 <= number < count.value:
        raise RuntimeUnavailableError(f"there is no GPU {number}, the CUDA driver has {count.value}; name another or none")
    driver.cuDeviceGet(ctypes.byref(device), number)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return CudaDevice(number, name.value.decode(errors="replace"), *capability)


def fill_memory(number: int, pieces: Iterable[tuple[int, int, int]]) -> None:
    """Set memory of a GPU, as (address, words of 4 bytes, value) each, in the context that CUDA's runtime shares; it is there on return.

    Raises:
        RuntimeUnavailableError: the driver fails.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context, none = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _require(driver.cuDeviceGet(ctypes.byref(device), number))
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _require(driver.cuCtxPushCurrent_v2(context))
    try:
        for address, words, value in pieces:
            if words:
                _require(driver.cuMemsetD32Async(ctypes.c_uint64(address), ctypes.c_uint(value), ctypes.c_size_t(words), none))
        _require(driver.cuStreamSynchronize(none))
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(none))
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _require(result: int) -> None:
    if result != 0:
        raise RuntimeUnavailableError(f"the CUDA driver fails with error {result}; the GPU's memory may be lost, open another session")


def native_of(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a manifest says of native kernels; None where the bundle has none.

    Raises:
        BundleError: it is malformed.
    """
    native = manifest.get("native")
    if native is None:
        return None
    names = native.get("architectures") if isinstance(native, Mapping) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BundleError(f"manifest.json: native is {str(native)[:60]!r}, expected an object with architectures; export the bundle again")
    return native


def ops_without_kernels(manifest: Mapping[str, Any]) -> list[str]:
    """The ops of a bundle with native kernels that have none.

    Raises:
        BundleError: the manifest is malformed.
    """
    native = native_of(manifest)
    return [] if native is None else sorted(set(map(str, native.get("without") or ())))


def kernels_reason(manifest: Mapping[str, Any], device: CudaDevice) -> str | None:
    """Why a GPU cannot run a bundle's native kernels, or None.

    Raises:
        BundleError: the manifest is malformed.
    """
    native = native_of(manifest)
    add = f"wm export --into BUNDLE --targets native --sm {device.architecture.removeprefix('sm_')}"
    if native is None:
        return f"the bundle has no native kernels; add them with `{add}`"
    names = native["architectures"]
    if device.kernels_of(names) is None:
        return f"the bundle's kernels are compiled for {', '.join(names)}, {device.name} is {device.architecture}; add them with `{add}`"
    return None


def load_libraries(names: Iterable[str]) -> str | None:
    """Load shared libraries for all that is loaded later: from the system's paths, else from Python's `nvidia` packages.

    Returns:
        The first that is nowhere, or None.
    """
    for name in names:
        if not _load(name) and not any(_load(str(place)) for place in _in_packages(name)):
            return name
    return None


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _in_packages(name: str) -> list[Path]:
    """Where the packages of CUDA's libraries have one: nvidia/cublas/lib of CUDA 12, nvidia/cu13/lib of CUDA 13."""
    spec = find_spec("nvidia")  # a namespace: several folders on the path
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [place for folder in folders for place in sorted(Path(folder).glob(f"*/lib/{name}"))]
