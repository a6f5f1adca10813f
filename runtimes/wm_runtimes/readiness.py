"""Whether runtimes run here, and run a bundle: real questions to libraries, drivers and manifests, in one place. Imports no torch."""

from dataclasses import dataclass
from importlib import import_module

from wm_graph.errors import RuntimeUnavailableError
from wm_graph.tolerances import model_limit
from wm_runtimes import RUNTIMES, availability, module_of
from wm_runtimes.bundle import Bundle

NATIVE = "native kernels"


@dataclass(frozen=True)
class Readiness:
    """An answer.

    Attributes:
        name: a key of `RUNTIMES`, or `native kernels`, which several of them use.
        reason: why it does not run, with what to do, in one line; None where it runs.
    """

    name: str
    reason: str | None

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.reason is None


def readiness(bundle: Bundle | None = None) -> tuple[Readiness, ...]:
    """Every runtime, and the native kernels: does it run here, and if a bundle is given, does it run that?

    Raises:
        BundleError: the bundle's manifest is malformed where a runtime looks.
    """
    found = [Readiness(name, availability(name) if bundle is None else unready(bundle, name)) for name in RUNTIMES]
    return (*found, Readiness(NATIVE, _native_reason(bundle)))


def unready(bundle: Bundle, runtime: str) -> str | None:
    """Why a runtime cannot run a bundle here, or None.

    Raises:
        InputError: the runtime is unknown.
        BundleError: the manifest is malformed.
    """
    if reason := availability(runtime):
        return reason
    try:
        model_limit(bundle.dtype, runtime)
    except KeyError:
        return f"does not run {bundle.dtype} bundles"
    if runtime.startswith("onnxruntime") and not any(file.endswith(".onnx") for file in bundle.files):
        return "the bundle has no ONNX file; add one with `wm export --into BUNDLE --targets onnx`"
    asks = getattr(import_module(f"wm_runtimes.{module_of(runtime)}"), "bundle_reason", None)
    reason = None if asks is None else asks(bundle)
    return reason if reason is None else str(reason)


def _native_reason(bundle: Bundle | None) -> str | None:
    """Why native kernels cannot be called here, or None."""
    from wm_runtimes.cuda_device import cuda_device, kernels_reason
    from wm_runtimes.native_kernels import NativeKernels, check_library

    try:
        check_library()
        device = cuda_device()
    except RuntimeUnavailableError as error:
        return str(error)
    if bundle is None:
        return None
    if (reason := kernels_reason(bundle.manifest, device)) is None:
        NativeKernels(bundle.path / "kernels").close()  # plans that cannot be read are refused here
    return reason
