"""The ONNX Runtime library of the native kernels, without a GPU: ONNX Runtime for CPUs, and the double of the CUDA driver.

`make cpp` builds two libraries of the same sources. One is for the CUDA execution provider, as it ships. The other, for tests alone, is for
the CPU execution provider: with the double, which computes on host memory, it shows the whole way from a node to launches and numbers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wm_graph.errors import RuntimeUnavailableError
from wm_runtimes.native_kernels import find_library

TESTS = Path(__file__).parent
GOLDEN = TESTS.parent / "runtimes" / "cpp" / "tests" / "golden"


def _built(name: str) -> Path:
    try:
        path = find_library().parent / name
    except RuntimeUnavailableError as reason:
        pytest.skip(str(reason))
    if not path.is_file():
        pytest.skip(f"{name} is not built: make cpp found no headers of ONNX Runtime")
    return path


def _run(library: str | None = None, double: bool = False, folder: Path | None = GOLDEN, **options: str) -> Any:
    """What onnxruntime_kernels_worker.py prints."""
    command = [sys.executable, str(TESTS / "onnxruntime_kernels_worker.py")]
    if double:
        command += ["--double", str(_built("double/libcuda.so.1"))]
    if library:
        command += ["--library", str(_built(library))]
    named = ({"wm.kernels": str(folder)} if folder else {}) | {f"wm.kernels.{name}": value for name, value in options.items()}
    command += [f"--option={name}={value}" for name, value in named.items()]
    paths = ":".join(str(TESTS.parent / name) for name in (".", "kernels", "export", "runtimes", "tests"))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CUDA = "libwm_kernels_onnxruntime.so"
ON_CPU = "libwm_kernels_onnxruntime_on_cpu.so"


def _without_driver() -> None:
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    pytest.skip("this machine has a CUDA driver")


def test_the_body_runs_without_the_library() -> None:
    assert _run(folder=None) == {"right": True, "launches": 0, "copies": 0}


def test_the_body_runs_with_the_library_where_there_is_no_cuda() -> None:
    _without_driver()
    assert _run(CUDA) == {"right": True, "launches": 0, "copies": 0}


def test_where_kernels_are_required_and_there_is_no_cuda_registering_says_so() -> None:
    _without_driver()
    assert "no CUDA here: libcuda.so.1 cannot be loaded" in _run(CUDA, required="1")["error"]


def test_kernels_take_the_place_of_the_body_and_a_bound_state_is_updated_in_place() -> None:
    # Three launches a call; only the call that is not bound copies its state.
    assert _run(ON_CPU, double=True) == {"right": True, "launches": 12, "copies": 1}


def test_a_session_without_the_cuda_provider_is_refused_where_there_is_a_driver() -> None:
    assert "WmAdd(1) node with name 'layers.0'" in _run(CUDA, double=True)["error"]


def test_without_its_option_the_library_is_refused() -> None:
    assert "the session option wm.kernels is not set" in _run(CUDA, folder=None)["error"]


def test_damaged_plans_are_refused_when_the_library_is_registered(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(GOLDEN, folder)
    (folder / "plans.json").write_bytes((GOLDEN / "plans.json").read_bytes()[:-9])
    error = _run(CUDA, folder=folder)["error"]
    assert "plans.json" in error
    assert "again" in error


def test_a_damaged_cubin_is_refused_when_the_session_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(GOLDEN, folder)
    (cubin,) = (folder / "sm_90").glob("add-*.cubin")
    cubin.write_bytes(cubin.read_bytes().replace(b"8", b"9"))
    error = _run(ON_CPU, double=True, folder=folder)["error"]
    assert f"{cubin} is not the file that was exported" in error


def test_only_the_entry_point_is_exported() -> None:
    found = subprocess.run(["nm", "-D", "--defined-only", str(_built(CUDA))], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in found.stdout.splitlines()] == ["RegisterCustomOps"]


def test_neither_cuda_nor_onnx_runtime_is_linked() -> None:
    for name in ("libwm_kernels.so", CUDA):
        found = subprocess.run(["readelf", "-d", str(_built(name))], capture_output=True, text=True, check=True)
        needed = [line for line in found.stdout.splitlines() if "NEEDED" in line]
        assert needed
        assert not [line for line in needed if "cuda" in line or "onnxruntime" in line]
