"""`wm doctor`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.console import print_fields, print_json, print_table

PACKAGES = {
    "numpy": "",
    "safetensors": "",
    "tokenizers": "",
    "onnxruntime": "onnxruntime-cpu: pip install 'wm-graph[cpu]'; onnxruntime-gpu does in its place",
    "onnxruntime-gpu": "onnxruntime-cuda: pip install 'wm-graph[gpu]', in place of onnxruntime",
    "torch": "init, export, eager, compiled: pip install 'wm-graph[export]'",
    "onnx": "export: pip install 'wm-graph[export]'",
    "onnxscript": "export: pip install 'wm-graph[export]'",
    "triton": "export of native kernels: pip install triton==3.6.0",
    "gguf": "import of GGUF files: pip install 'wm-graph[import]'",
}


def command(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle: say which runtimes run it here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which runtimes run here, and what is missing for the others."""
    from wm_runtimes import open_bundle
    from wm_runtimes.readiness import readiness

    found = readiness(None if bundle is None else open_bundle(bundle))
    versions = {name: package_version(name) for name in ("wm-graph", *PACKAGES)}
    machine = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "memory": memory_bytes(),
        "gpu": gpu(),
    }
    if as_json:
        runtimes = {one.name: {"available": one.runs, "reason": one.reason} for one in found}
        print_json({"runtimes": runtimes, "versions": versions, **machine} | ({"bundle": str(bundle)} if bundle else {}))
        return
    title = "runs here" if bundle is None else f"runs {bundle} here"
    print_table(("runtime", title), [[one.name, "yes" if one.runs else f"no: {one.reason}"] for one in found])
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


def gpu() -> str | None:
    """The first NVIDIA GPU and its architecture, or None."""
    from wm_graph.errors import RuntimeUnavailableError
    from wm_runtimes.cuda_device import cuda_device

    try:
        device = cuda_device()
    except RuntimeUnavailableError:
        return None
    return f"{device.name} ({device.architecture})"


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _shown(name: str, value: Any) -> str:
    if name == "memory":
        return "unknown" if value is None else f"{value / 1e9:.1f} GB"
    return "none" if value is None else str(value)
