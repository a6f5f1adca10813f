"""`wm doctor`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.console import print_fields, print_json, print_table

PACKAGES = {
    "numpy": "",
    "safetensors": "",
    "tokenizers": "",
    "onnxruntime": "onnxruntime-cpu: pip install 'wm-graph[cpu]'",
    "torch": "init, export, eager, compiled: pip install 'wm-graph[export]'",
    "onnx": "export: pip install 'wm-graph[export]'",
    "onnxscript": "export: pip install 'wm-graph[export]'",
    "gguf": "import of GGUF files: pip install 'wm-graph[import]'",
}


def command(as_json: AsJson = False) -> None:
    """Say which runtimes run here, and what is missing for the others."""
    from wm_runtimes import RUNTIMES, availability

    reasons = {name: availability(name) for name in RUNTIMES}
    versions = {name: package_version(name) for name in ("wm-graph", *PACKAGES)}
    machine = {"python": platform.python_version(), "platform": platform.platform(), "cores": usable_cores(), "memory": memory_bytes()}
    if as_json:
        runtimes = {name: {"available": reason is None, "reason": reason} for name, reason in reasons.items()}
        print_json({"runtimes": runtimes, "versions": versions, **machine})
        return
    print_table(("runtime", "runs here"), [[name, "yes" if reason is None else f"no: {reason}"] for name, reason in reasons.items()])
    print()
    print_table(("package", "version"), [[name, found or f"missing, needed for {PACKAGES.get(name)}"] for name, found in versions.items()])
    print()
    print_fields({name: _shown(name, value) for name, value in machine.items()})


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _shown(name: str, value: Any) -> str:
    if name == "memory":
        return "unknown" if value is None else f"{value / 1e9:.1f} GB"
    return str(value)
