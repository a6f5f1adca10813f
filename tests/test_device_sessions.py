"""The session for GPUs on host memory: what it does around ONNX Runtime, without a GPU. Bit by bit against the session for CPUs.

The provider is ONNX Runtime's for CPUs here, and addresses are the host's; nothing else of the session is changed.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toy_bundle import VOCAB, make_toy_bundle
from wm_graph.errors import BundleError, ConfigError, InputError, RuntimeUnavailableError
from wm_runtimes import Session, open_bundle, open_session
from wm_runtimes.cuda_device import CudaDevice, kernels_reason, load_libraries
from wm_runtimes.cuda_graphs import CapturedSteps
from wm_runtimes.device_buffers import Device, DeviceBuffers
from wm_runtimes.labels import split_label, way_options
from wm_runtimes.onnxruntime_cuda import OnnxRuntimeCudaSession
from wm_runtimes.snapshot import Array

H100 = CudaDevice(0, "NVIDIA H100", 9, 0)
RNG = np.random.default_rng(0)


class OnHost(OnnxRuntimeCudaSession):
    """The session, its memory on the host."""

    _kind, _provider = "cpu", "CPUExecutionProvider"

    def _prepare(self, bundle: Any, kernels: bool | None, device: int) -> bool:
        return False

    def _providers(self) -> list[Any]:
        return ["CPUExecutionProvider"]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle")


def opened(path: Path, batch: int = 3, capacity: int = 24, **options: Any) -> OnHost:
    return OnHost(open_bundle(path), batch, capacity, **options)


def same_state(one: Session, other: Session) -> None:
    for name, array in one.snapshot().leaves.items():
        np.testing.assert_array_equal(array, other.snapshot().leaves[name], err_msg=name)


def drive(session: Session) -> list[Array]:
    """Prompts, steps, rows, snapshots and resets; the logits of all."""
    rng = np.random.default_rng(7)
    tokens_BT = rng.integers(0, VOCAB, (3, 20))
    out = [session.prefill(tokens_BT[:, :6], valid=[6, 2, 4]), session.decode(tokens_BT[:, 6])]
    saved = session.snapshot()
    out += [session.decode(tokens_BT[:, step]) for step in (7, 8)]
    out += [session.decode(tokens_BT[:2, 9], rows=[1, 2]), session.decode(tokens_BT[:2, 9], rows=[2, 0])]
    session.permute([2, 2, 1])
    out.append(session.decode(tokens_BT[:, 10]))
    session.restore(saved)
    session.reset([1])
    out += [session.prefill(tokens_BT[:, 11:14]), session.decode(tokens_BT[:, 15])]
    out.append(session.prefill(tokens_BT[:1, :9], rows=[2], select=[[0, 8, 3]]))
    return out


@pytest.mark.parametrize("alias", [True, False])
def test_everything_a_session_does_gives_the_bits_of_the_session_for_cpus(toy: Path, alias: bool) -> None:
    with opened(toy, alias=alias) as mine, open_session(toy, batch=3, capacity=24) as theirs:
        for got, expected in zip(drive(mine), drive(theirs), strict=True):
            np.testing.assert_array_equal(got, expected)
        same_state(mine, theirs)
        assert mine.steps.captured == (1 if alias else 0)
        assert bool(mine.steps.replays) is alias


def test_snapshots_go_from_one_kind_of_session_to_the_other(toy: Path) -> None:
    with opened(toy) as mine, open_session(toy, batch=3, capacity=24) as theirs:
        mine.prefill(RNG.integers(0, VOCAB, (3, 5)))
        theirs.restore(mine.snapshot())
        np.testing.assert_array_equal(mine.decode([1, 2, 3]), theirs.decode([1, 2, 3]))
        mine.restore(theirs.snapshot())
        same_state(mine, theirs)


# Captured steps


class Recorded:
    """A model of one row whose step adds the token to a sum in memory; graphs do to it what they are told to."""

    def __init__(self, buffers: DeviceBuffers, name: str, runs: int = 3, frozen: bool = False, drifts: bool = False) -> None:
        self.buffers, self.name, self.runs, self.frozen, self.drifts = buffers, name, runs, frozen, drifts
        self.graphs: dict[str, int] = {}
        self.bound: Any = None

    def run_with_iobinding(self, io: Any, options: Any) -> None:
        graph = options.get_run_config_entry("gpu_graph_id")
        token = int(self.bound.parts["tokens"][0, 0])
        if graph == "-1":
            return self._step(token)
        if graph not in self.graphs:
            self.graphs[graph] = token
            for _ in range(self.runs):
                self._step(token)
            return None
        return self._step((self.graphs[graph] if self.frozen else token) + self.drifts)

    def _step(self, token: int) -> None:
        total = self.buffers.read(self.name, 0, 1) + token
        self.buffers.write(self.name, 0, total)
        self.bound.logits_BSV.update_inplace(total.reshape(1, 1, 1).astype(np.float32))


def captured(toy: Path, **faults: Any) -> tuple[list[float], CapturedSteps]:
    """The logits of four steps, and what came of capturing them."""
    from onnxruntime import OrtValue

    with opened(toy, batch=1) as session:
        buffers = session._buffers
        assert isinstance(buffers, DeviceBuffers)
        model = Recorded(buffers, "layers.0.ssd", **faults)
        host = np.zeros(2, np.int64)
        parts = {"tokens": host[:1].reshape(1, 1), "position": host[1:]}
        values = {
            "inputs": OrtValue.ortvalue_from_numpy(host.copy()),
            "logits_BSV": OrtValue.ortvalue_from_numpy(np.zeros((1, 1, 1), np.float32)),
        }
        model.bound = SimpleNamespace(io=None, host=host, parts=parts, rows=(0, 1), is_step=True, graphs={}, **values)
        steps = CapturedSteps(wanted=True)
        logits = []
        for position, token in enumerate((5, 3, 2, 7)):
            parts["tokens"][...], parts["position"][...] = token, position
            model.bound.inputs.update_inplace(host)
            steps.run(model, model.bound, buffers, 24)
            logits.append(float(model.bound.logits_BSV.numpy().item()))
        return logits, steps


def test_a_capture_that_runs_the_step_several_times_leaves_the_state_of_one(toy: Path) -> None:
    logits, steps = captured(toy)
    assert logits == [5, 8, 10, 17]
    assert (steps.captured, steps.replays, steps.reason) == (1, 3, "")


@pytest.mark.parametrize("fault", [{"frozen": True}, {"drifts": True}], ids=["inputs frozen at capture", "another result"])
def test_a_replay_that_differs_is_not_used_and_the_reason_is_kept(toy: Path, fault: dict[str, bool]) -> None:
    logits, steps = captured(toy, **fault)
    assert logits == [5, 8, 10, 17]
    assert (steps.captured, steps.replays) == (0, 0)
    assert "differs from a plain one in layers.0.ssd" in steps.reason


def test_a_capture_that_fails_is_not_used_and_the_reason_is_kept(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *arguments: Any) -> None:
        raise RuntimeError("out of graphs\nand more")

    monkeypatch.setattr(CapturedSteps, "_capture_other", fail)
    logits, steps = captured(toy)
    assert logits == [5, 8, 10, 17]
    assert (steps.captured, steps.reason) == (0, "capturing a step failed: out of graphs")


def test_graphs_are_of_one_thread_and_of_a_limited_number(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("wm_runtimes.cuda_graphs._MOST", 1)
    with opened(toy, batch=2) as mine, open_session(toy, batch=2, capacity=24) as theirs, ThreadPoolExecutor(1) as thread:
        for step in range(6):
            expected = theirs.decode([step, 3])
            got = mine.decode([step, 3]) if step % 2 else thread.submit(mine.decode, [step, 3]).result()
            np.testing.assert_array_equal(got, expected)
        assert mine.steps.captured == 1
        assert mine.steps.replays == 2
        assert "1 graphs are captured already" in mine.steps.reason


# Memory


def test_whole_windows_are_cut_to_the_slots_in_use_when_they_leave_the_device(toy: Path) -> None:
    """A window of 3 slots in a session of 2 tokens: kernels use any of the slots."""
    bundle = open_bundle(toy)
    with opened(toy, batch=2, capacity=2) as session:
        device = Device(session._model, "cpu", 0)
        whole = DeviceBuffers(device, bundle.state, 2, 2, 3, whole_windows=True)
        cut = DeviceBuffers(device, bundle.state, 2, 2, 3)
    name = "layers.0.slot_position"
    assert (whole.places[name].shape, cut.places[name].shape, whole.layout()[name]) == ((2, 3), (2, 2), ((2, 2), "int64"))
    assert whole.layout() == cut.layout()
    whole.write(name, 0, np.array([[-1, 7, 4], [-1, -1, 9]]))
    np.testing.assert_array_equal(whole.copy()[name], [[7, 4], [9, -1]])
    other = DeviceBuffers(device, bundle.state, 2, 2, 3, whole_windows=True)
    other.fill(whole.copy())
    np.testing.assert_array_equal(other.read(name, 0, 2), [[7, 4, -1], [9, -1, -1]])


def test_leaves_begin_where_kernels_may_read_them_and_rows_that_do_not_are_copied(toy: Path) -> None:
    with opened(toy) as session:
        buffers = session._buffers
        assert isinstance(buffers, DeviceBuffers)
        assert all(place.address % 256 == 0 for place in buffers.places.values())
        assert not buffers.rows_are_aligned  # rows of one float
        assert [session._runs_from(start) for start in (0, 1)] == [True, False]


# What is refused


def test_a_node_on_the_host_that_computes_no_size_is_refused_by_name(toy: Path) -> None:
    class Elsewhere(OnHost):
        def _belongs(self, provider: str, node: Any) -> bool:
            return OnnxRuntimeCudaSession._belongs(SimpleNamespace(_provider="CUDAExecutionProvider"), provider, node)  # type: ignore[arg-type]

    with pytest.raises(RuntimeUnavailableError, match=r"\d+ nodes would not run on the GPU: .*\(CumSum\)") as caught:
        Elsewhere(open_bundle(toy), 1, 8)
    assert "(Shape)" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_session_whose_provider_does_not_start_is_refused(toy: Path) -> None:
    class Fallen(OnHost):
        _provider = "CUDAExecutionProvider"

    with pytest.raises(RuntimeUnavailableError, match="CUDA provider does not start here"):
        Fallen(open_bundle(toy), 1, 8)


@pytest.mark.parametrize("options", [{"graph": "other.onnx"}, {"device": -1}, {"device": True}])
def test_options_that_cannot_be_are_refused(toy: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        opened(toy, **options)


@pytest.mark.parametrize(
    ("major", "minor", "architectures", "expected"),
    [
        (9, 0, ["sm_80", "sm_90"], "sm_90"),
        (9, 0, ["sm_80", "sm_100"], None),
        (8, 9, ["sm_80", "sm_86", "sm_90"], "sm_86"),
        (8, 0, ["sm_86"], None),
        (10, 0, ["sm_100"], "sm_100"),
        (12, 0, ["sm_80"], None),
    ],
)
def test_a_gpu_runs_the_kernels_of_its_architecture(major: int, minor: int, architectures: list[str], expected: str | None) -> None:
    assert CudaDevice(0, "", major, minor).kernels_of(architectures) == expected


def test_kernels_of_other_architectures_are_refused_with_what_to_do() -> None:
    assert kernels_reason({"native": {"architectures": ["sm_80", "sm_90"]}}, H100) is None
    other = kernels_reason({"native": {"architectures": ["sm_80", "sm_100"]}}, H100)
    assert other == (
        "the bundle's kernels are compiled for sm_80, sm_100, NVIDIA H100 is sm_90; "
        "add them with `wm export --into BUNDLE --targets native --sm 90`"
    )
    assert "has no native kernels" in str(kernels_reason({}, H100))
    for damaged in ({"architectures": "sm_90"}, {"architectures": []}, [], {"architectures": [90]}):
        with pytest.raises(BundleError, match=r"manifest\.json: native is"):
            kernels_reason({"native": damaged}, H100)


def test_a_library_that_is_nowhere_is_named() -> None:
    assert load_libraries(["libc.so.6", "libnowhere.so.3"]) == "libnowhere.so.3"
    assert load_libraries(["libc.so.6"]) is None


def test_a_library_is_found_in_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes.util
    import shutil

    found = ctypes.util.find_library("m")
    source = next(
        (path for folder in ("/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib") if (path := Path(folder) / str(found)).exists()),
        None,
    )
    if source is None:
        pytest.skip("this system's libm is not where it is looked for")
    place = tmp_path / "nvidia" / "cu13" / "lib"
    place.mkdir(parents=True)
    shutil.copy(source, place / "libwm_of_a_package.so.7")
    assert load_libraries(["libwm_of_a_package.so.7"]) == "libwm_of_a_package.so.7"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_libraries(["libwm_of_a_package.so.7"]) is None


# Labels


def test_labels_name_kernels_and_bodies() -> None:
    assert split_label("onnxruntime-cuda:bodies") == ("onnxruntime-cuda", "bodies")
    assert way_options("onnxruntime-cuda:bodies") == {"kernels": False}
    assert way_options("onnxruntime-cuda:kernels") == {"kernels": True}
    assert way_options("onnxruntime-cuda") == {}
    with pytest.raises(ConfigError, match=r"no way to run 'model\.onnx'; choose from kernels, bodies"):
        split_label("onnxruntime-cuda:model.onnx")
