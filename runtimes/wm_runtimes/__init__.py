"""wm-runtimes: run a bundle. numpy in, numpy out; torch is imported only by the runtimes that need it.

Names load on first use, so that importing this package costs next to nothing.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wm_graph.errors import InputError

if TYPE_CHECKING:
    from wm_runtimes.bundle import Bundle, open_bundle, sha256_of
    from wm_runtimes.session import Session
    from wm_runtimes.snapshot import Snapshot
    from wm_runtimes.text import ChatTemplate, StopMatcher, TextStream, Tokenizer

_HOME = {
    "Bundle": "bundle",
    "open_bundle": "bundle",
    "sha256_of": "bundle",
    "Session": "session",
    "Snapshot": "snapshot",
    "ChatTemplate": "text",
    "StopMatcher": "text",
    "TextStream": "text",
    "Tokenizer": "text",
}

__all__ = [
    "RUNTIMES",
    "Bundle",
    "ChatTemplate",
    "Session",
    "Snapshot",
    "StopMatcher",
    "TextStream",
    "Tokenizer",
    "availability",
    "open_bundle",
    "open_session",
    "sha256_of",
]

_SESSIONS = {
    "eager": ("torch_runtimes", "EagerSession"),
    "compiled": ("torch_runtimes", "CompiledSession"),
    "onnxruntime-cpu": ("onnxruntime_cpu", "OnnxRuntimeCpuSession"),
    "onnxruntime-cuda": ("onnxruntime_cuda", "OnnxRuntimeCudaSession"),
}


def _factory(name: str) -> "Callable[..., Session]":
    module, cls = _SESSIONS[name]

    def make(bundle: "Bundle", batch: int = 1, capacity: int = 1024, **options: Any) -> "Session":
        import inspect

        session_class = getattr(import_module(f"wm_runtimes.{module}"), cls)
        known = [key for key in inspect.signature(session_class).parameters if key not in ("bundle", "batch", "capacity")]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"{name}: unknown option {unknown[0]!r}; it takes {', '.join(known) or 'none'}")
        session: Session = session_class(bundle, batch, capacity, **options)
        return session

    return make


RUNTIMES: "dict[str, Callable[..., Session]]" = {name: _factory(name) for name in _SESSIONS}


def open_session(
    bundle: "Bundle | str | os.PathLike[str]", runtime: str = "onnxruntime-cpu", batch: int = 1, capacity: int = 1024, **options: Any
) -> "Session":
    """A session on a bundle.

    Args:
        bundle: the bundle's folder, or a bundle already opened.
        runtime: a key of `RUNTIMES`.
        batch: number of rows.
        capacity: most tokens that a row can hold.
        options: of the runtime; its session class lists them.

    Raises:
        InputError: the runtime or an option is unknown, or a size is out of range.
        BundleError: the bundle is missing or damaged.
        RuntimeUnavailableError: the runtime cannot run here, or cannot run this bundle.
    """
    _check_known(runtime)
    from wm_runtimes.bundle import Bundle, open_bundle

    if not isinstance(bundle, Bundle):
        bundle = open_bundle(bundle)
    return RUNTIMES[runtime](bundle, batch, capacity, **options)


def availability(runtime: str) -> str | None:
    """Why a runtime cannot run here, or None if it can.

    Raises:
        InputError: the runtime is unknown.
    """
    _check_known(runtime)
    reason: str | None = import_module(f"wm_runtimes.{module_of(runtime)}").availability(runtime)
    return reason


def module_of(runtime: str) -> str:
    """The module of a runtime: it has `availability`, and where a bundle may ask for more than is here, `bundle_reason`."""
    return _SESSIONS[runtime][0]


def _check_known(runtime: str) -> None:
    if runtime not in RUNTIMES:
        raise InputError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wm_runtimes' has no attribute '{name}'")
    return getattr(import_module(f"wm_runtimes.{_HOME[name]}"), name)
