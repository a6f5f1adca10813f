"""`wm doctor` and `wm check` ask: what is missing is missed, what does not fit is said, in one line that tells what to install."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli_support import wm
from toy_bundle import make_toy_bundle
from wm_graph.errors import RuntimeUnavailableError
from wm_runtimes import RUNTIMES, open_bundle
from wm_runtimes.cuda_device import CudaDevice, cuda_device
from wm_runtimes.onnxruntime_cuda import bundle_reason
from wm_runtimes.readiness import NATIVE, readiness, unready

ROOT = Path(__file__).parent.parent
EXTRAS = ("wm-graph[cpu]", "wm-graph[gpu]", "wm-graph[export]")

# A process in which packages are absent, or found and broken, whatever is installed.
_BLOCKED = """
import sys
from importlib.machinery import ModuleSpec
blocked, how = sys.argv[1].split(","), sys.argv[2]
class Broken:
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise ImportError(f"{module.__name__} needs a library that is not here")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            if how == "broken":
                return ModuleSpec(name, Broken())
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if how == "absent" and name in blocked else real(name, package)
from wm_graph.cli import run
code = run(["doctor", "--json"])
print(sorted(name for name in ("torch", "onnx", "onnxruntime") if name in sys.modules), file=sys.stderr)
sys.exit(code)
"""


def doctor(*blocked: str, how: str = "absent") -> tuple[dict[str, Any], list[str]]:
    """What `wm doctor --json` says where packages are blocked, and which large packages it imported."""
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "export", "runtimes"))
    command = [sys.executable, "-c", _BLOCKED, ",".join(blocked), how]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1].replace("'", '"'))


def test_every_runtime_of_the_registry_and_nothing_else_is_listed() -> None:
    found, imported = doctor()
    assert list(found["runtimes"]) == [*RUNTIMES, NATIVE]
    for name, answer in found["runtimes"].items():
        assert answer["available"] is (answer["reason"] is None), name
        assert "\n" not in (answer["reason"] or "")
    assert "torch" not in imported
    assert "onnx" not in imported


def test_a_package_that_is_not_there_is_missed_and_the_extra_is_named() -> None:
    found, _ = doctor("onnxruntime", "torch")
    reasons = {name: answer["reason"] for name, answer in found["runtimes"].items()}
    for name in ("eager", "compiled", "onnxruntime-cpu", "onnxruntime-cuda"):
        assert any(extra in reasons[name] for extra in EXTRAS), reasons[name]
        assert "is not installed" in reasons[name]
    whole, _ = doctor()
    assert whole["runtimes"]["eager"]["available"]
    assert whole["runtimes"]["onnxruntime-cpu"]["available"]


def test_a_package_that_is_there_and_cannot_be_imported_is_missed() -> None:
    """A folder is found where its import fails: asking the system for it is not enough."""
    found, _ = doctor("onnxruntime", how="broken")
    for name in ("onnxruntime-cpu", "onnxruntime-cuda"):
        answer = found["runtimes"][name]
        assert not answer["available"]
        assert "onnxruntime cannot be imported (onnxruntime needs a library that is not here)" in answer["reason"]
    assert found["runtimes"]["eager"]["available"]


def test_the_answer_comes_in_seconds() -> None:
    doctor()
    start = time.process_time(), os.times().children_user + os.times().children_system
    doctor()
    assert os.times().children_user + os.times().children_system - start[1] < 3


def test_a_machine_without_a_gpu_is_told_so() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RuntimeUnavailableError, match="no CUDA driver"):
            cuda_device()
        return
    assert cuda_device().major >= 3
    with pytest.raises(RuntimeUnavailableError, match="there is no GPU 999"):
        cuda_device(999)


def test_a_bundle_is_told_by_its_dtype_and_files(tmp_path: Path) -> None:
    half = open_bundle(make_toy_bundle(tmp_path / "half", dtype="bfloat16"))
    assert unready(half, "onnxruntime-cpu") == "does not run bfloat16 bundles"
    folder = make_toy_bundle(tmp_path / "plain")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.onnx", "model.ort.onnx"):
        del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "the bundle has no ONNX file; add one with" in str(unready(open_bundle(folder), "onnxruntime-cpu"))


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine with an H100, ONNX Runtime for GPUs and the libraries: all that a bundle is not asked about."""
    for module in ("cuda_device", "onnxruntime_cuda"):
        monkeypatch.setattr(f"wm_runtimes.{module}.cuda_device", lambda number=0: CudaDevice(number, "NVIDIA H100", 9, 0))
    monkeypatch.setattr("wm_runtimes.onnxruntime_cuda.availability", lambda runtime="": None)
    monkeypatch.setattr("wm_runtimes.onnxruntime_cuda.find_library", lambda name: tmp_path / name)
    monkeypatch.setattr("wm_runtimes.native_kernels.check_library", lambda: None)


def test_kernels_of_another_architecture_are_refused_by_doctor_and_check(on_h100, tmp_path: Path, capfd) -> None:
    folder = make_toy_bundle(
        tmp_path / "bundle", native={"architectures": ["sm_80", "sm_100"], "triton": "3.6.0", "ops": [], "without": []}
    )
    reason = "the bundle's kernels are compiled for sm_80, sm_100, NVIDIA H100 is sm_90; add them with"
    found = {one.name: one.reason for one in readiness(open_bundle(folder))}
    assert str(found["onnxruntime-cuda"]).startswith(reason)
    assert "onnxruntime-cuda:bodies" in str(found["onnxruntime-cuda"])
    assert str(found[NATIVE]).startswith(reason)
    told = wm(capfd, "doctor", folder, "--json").json
    assert told["runtimes"]["onnxruntime-cuda"]["reason"] == found["onnxruntime-cuda"]
    assert told["gpu"] == "NVIDIA H100 (sm_90)"
    assert found["onnxruntime-cuda"] in wm(capfd, "doctor", folder).out
    refused = wm(capfd, "check", folder, "--runtimes", "onnxruntime-cuda")
    assert refused.code in (2, 3)


def test_a_bundle_that_lacks_a_kernel_runs_its_body_unless_kernels_are_asked_for(on_h100, tmp_path: Path) -> None:
    native = {"architectures": ["sm_90"], "without": ["scored_attention"]}
    bundle = open_bundle(make_toy_bundle(tmp_path / "bundle", native=native))
    assert bundle_reason(bundle) is None
    assert bundle_reason(bundle, kernels=False) is None
    assert str(bundle_reason(bundle, kernels=True)).startswith("scored_attention has no native kernel for this model")
    whole = open_bundle(make_toy_bundle(tmp_path / "whole", native=native | {"without": []}))
    assert bundle_reason(whole, kernels=True) is None


def test_kernels_of_this_architecture_and_bodies_of_a_bundle_without_are_ready(on_h100, tmp_path: Path) -> None:
    mine = open_bundle(make_toy_bundle(tmp_path / "mine", native={"architectures": ["sm_90"]}))
    none = open_bundle(make_toy_bundle(tmp_path / "none"))
    assert unready(mine, "onnxruntime-cuda") is None
    assert unready(none, "onnxruntime-cuda") is None
    assert "has no native kernels" in str({one.name: one.reason for one in readiness(none)}[NATIVE])


def test_a_bundle_that_is_no_bundle_is_the_users_mistake(capfd, tmp_path: Path) -> None:
    refused = wm(capfd, "doctor", tmp_path / "absent")
    assert refused.code == 2
    assert "no such bundle folder" in refused.err
