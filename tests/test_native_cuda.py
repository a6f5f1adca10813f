"""libwm_kernels on a GPU: the same bits as Triton's launches, in graphs and threads too, and calls that are refused."""

import threading
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, byref, c_int, c_void_p
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from native_cases import declaration, eager_call, use_of
from wm_graph.errors import InputError, RuntimeUnavailableError, WmError
from wm_runtimes.native_kernels import DeviceTensor, NativeKernels, find_library


def _missing() -> str | None:
    """Why nothing here can run."""
    if not torch.cuda.is_available():
        return "no CUDA device on this machine"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        find_library()
    except RuntimeUnavailableError as reason:
        return str(reason)
    return None


pytestmark = [
    pytest.mark.skipif(_missing() is not None, reason=str(_missing())),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),  # of filled_memory's mode; nothing here asks for more of it
]

if find_spec("triton") is not None:
    from native_gpu import CASES, SIZES, LibraryCall, compiled, copied, filled_memory, named_folder, same, values_of

    NAMES = [f"{op}-{index}-{dtype}" for op, index, dtype in CASES]
else:
    CASES = NAMES = SIZES = ()

STEP = {"B": 2, "T": 1, "M": 2, "S": 64}
CAPTURED = (("ssd_scan_rope", 1), ("attention_rope", 1), ("selective_scan", 0), ("moe_mix", 0), ("residual_rms_norm", 0))
THREADS, STEPS = 8, 1000


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The kernels of all cases, compiled once for all processes of this run."""
    return compiled(named_folder() or tmp_path_factory.getbasetemp().parent / "native_kernels")


@pytest.fixture(scope="module")
def kernels(folder):
    opened = NativeKernels(folder)
    opened.verify()
    return opened


@pytest.fixture(autouse=True)
def _no_products(monkeypatch):
    """Prompts' products may be cuBLAS's in eager; here it launches kernels of its own."""
    monkeypatch.setattr(import_module("wm_kernels.expert_mix.triton_op"), "serves_products", lambda *sizes: False)


def eager(use, given, in_place):
    if use.op == "scored_attention":  # eager's scores are torch's to write
        T = given["score_BTA"].shape[1]
        for score_TA, cells_AS, position in zip(given["score_BTA"], given["cache_score_BAS"], given["position_B"].tolist(), strict=True):
            cells_AS[:, position : position + T] = score_TA.mT
    return eager_call(use, given, in_place)


@pytest.mark.parametrize(("op", "index", "dtype"), CASES, ids=NAMES)
def test_a_call_through_the_library_gives_the_bits_of_eager_launches(op, index, dtype, kernels):
    use = use_of(op, index, dtype)
    states = [one.alias for one in declaration(op).outputs if one.alias in dict(use.dtypes)]
    with filled_memory(), torch.cuda.stream(torch.cuda.Stream()):
        for seed, sizes in enumerate(SIZES):
            given = values_of(use, sizes, seed)
            for in_place in (True, False) if states else (False,):
                expected = eager(use, copied(given), in_place)
                mine = copied(given)
                found = LibraryCall(kernels, use, mine, in_place).launch()
                torch.cuda.current_stream().synchronize()
                same(found, expected, f"{sizes}, {'in place' if in_place else 'apart'}")
                kept = [name for name in given if not (in_place and name in states)]
                same([mine[name] for name in kept], [given[name] for name in kept], f"{sizes}, inputs")
                for one in found:
                    written = not one.isnan().any() if one.is_floating_point() else one.abs().max() < torch.iinfo(one.dtype).max
                    assert written, f"{sizes}: not all was written"


@pytest.mark.parametrize(("op", "index"), CAPTURED)
@pytest.mark.parametrize("sizes", [STEP, SIZES[2]], ids=["step", "prompt"])
def test_replays_of_a_captured_graph_give_the_bits_of_direct_launches(op, index, sizes, kernels):
    use = use_of(op, index, torch.bfloat16)
    first, *later = (values_of(use, sizes, seed) for seed in range(3))
    call = LibraryCall(kernels, use, copied(first), True)
    call.op.load()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch()
    for given in (first, *later):
        expected = [one.clone() for one in LibraryCall(kernels, use, copied(given), True).launch()]
        for name, value in given.items():
            call.given[name].copy_(value)
        for one in call.outputs:
            if not any(one is value for value in call.given.values()):
                one.fill_(3)
        graph.replay()
        torch.cuda.synchronize()
        same(call.outputs, expected, op)


def test_a_first_call_under_capture_is_refused_and_the_capture_goes_on(folder):
    use = use_of("residual_rms_norm", 0, torch.bfloat16)
    after = torch.zeros(4, device="cuda")
    with NativeKernels(folder) as fresh:
        call = LibraryCall(fresh, use, values_of(use, STEP, 0), False)
        before = [one.fill_(3).clone() for one in call.outputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with pytest.raises(InputError, match=r"^[^\n]+$"):
                call.launch()
            after += 1
        graph.replay()
        torch.cuda.synchronize()
        same(call.outputs, before, "outputs")
        assert after.tolist() == [1] * 4
        call.op.close()


def steps(kernels, op, index, seed):
    """STEPS steps on a stream of their own, the state carried on; every output summed up, the last ones, and the state."""
    use = use_of(op, index, torch.bfloat16)
    torch.cuda.set_device(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        tokens = [values_of(use, STEP, seed + offset) for offset in range(4)]
        call = LibraryCall(kernels, use, copied(tokens[0]), True)
        states = {one.alias for one in declaration(op).outputs}
        total = torch.zeros_like(call.outputs[0], dtype=torch.float32)
        for step in range(STEPS):
            for name, value in tokens[step % 4].items():
                if name not in states:
                    call.given[name].copy_(value)
            total += call.launch()[0]
        torch.cuda.current_stream().synchronize()
        return [total, *call.outputs]


@pytest.mark.parametrize(("op", "index"), [("ssd_scan_rope", 1), ("selective_scan", 1), ("attention_rope", 1), ("moe_mix", 1)])
def test_eight_threads_with_streams_of_their_own_give_the_numbers_of_one(op, index, kernels):
    expected = [steps(kernels, op, index, seed) for seed in range(THREADS)]
    assert all(one.isfinite().all() for every in expected for one in every)
    barrier = threading.Barrier(THREADS)

    def work(seed):
        barrier.wait()
        return steps(kernels, op, index, seed)

    with ThreadPoolExecutor(THREADS) as threads:
        for seed, found in enumerate(threads.map(work, range(THREADS))):
            same(found, expected[seed], f"thread {seed}")


@pytest.fixture
def norm(kernels):
    """A call that would be served, its outputs filled with what nothing computes."""
    use = use_of("residual_rms_norm", 0, torch.bfloat16)
    call = LibraryCall(kernels, use, values_of(use, STEP, 0), False)
    for one in call.outputs:
        one.fill_(3)
    yield call
    torch.cuda.synchronize()
    assert all((one == 3).all() for one in call.outputs), "a call that was refused wrote"
    call.launch()
    torch.cuda.synchronize()
    assert not any((one == 3).all() for one in call.outputs), "the call as it was is served"


def test_a_tensor_aligned_to_too_few_bytes_is_refused_and_outputs_stay(norm):
    x = norm.inputs[0]
    room = torch.zeros(x.shape[0] * x.shape[1] + 8, dtype=torch.bfloat16, device="cuda")
    beside = DeviceTensor(room.data_ptr() + room.element_size(), x.shape, x.dtype)
    with pytest.raises(InputError, match=r"^[^\n]*not aligned[^\n]*$"):
        norm.op.launch([beside, *norm.inputs[1:]], norm.places, norm.scratch.data_ptr(), norm.scratch.numel())


@pytest.mark.parametrize("shape", [(3, 1024), (2, 1023), (2, 1024, 1), (2,)])
def test_shapes_that_do_not_bind_are_refused_and_outputs_stay(norm, shape):
    x = norm.inputs[0]
    with pytest.raises(InputError, match=r"^[^\n]+$"):
        norm.op.launch([DeviceTensor(x.address, shape, x.dtype), *norm.inputs[1:]], norm.places)


def test_a_stream_of_another_context_is_refused_and_outputs_stay(norm):
    driver, context, stream = CDLL("libcuda.so.1"), c_void_p(), c_void_p()
    norm.op.load()
    device = c_int()
    assert driver.cuCtxGetDevice(byref(device)) == 0
    assert driver.cuCtxCreate_v2(byref(context), 0, device) == 0
    try:
        assert driver.cuStreamCreate(byref(stream), 1) == 0
        assert driver.cuCtxPopCurrent_v2(byref(c_void_p())) == 0
        with pytest.raises(WmError, match=r"^[^\n]+$"):
            norm.launch(stream.value)
    finally:
        driver.cuCtxDestroy_v2(context)


def test_a_thread_without_a_context_is_refused_and_outputs_stay(norm):
    stream = torch.cuda.current_stream().cuda_stream
    with ThreadPoolExecutor(1) as thread, pytest.raises(RuntimeUnavailableError, match=r"^[^\n]+$"):
        thread.submit(norm.launch, stream).result()
