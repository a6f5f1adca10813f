"""`wm export --targets native`: what it writes and how it is found again, and kernels that it refuses to let travel."""

import hashlib
import json
import shutil
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from triton_support import ON_CUDA, check, missing, wide
from wm_export import export_bundle, export_into
from wm_graph import ModelConfig, init_params, save_checkpoint
from wm_graph.errors import ExportError
from wm_runtimes.bundle import open_bundle

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
MODEL = ModelConfig(
    name="one-layer", vocab_size=64, d_model=64, d_ff=96, n_head=4, n_kv_head=2, head_dim=16, layers=(("attention", "mlp"),)
)  # fmt: skip
ROWS = {"x": "ptr:bfloat16:16", "y": "ptr:bfloat16:16", "M": "i32", "stride": "i32:16"}
D, TILE = 512, 8


def copying(**changed):
    from wm_kernels.native import Kernel

    return Kernel(("native_kernels", "copy_rows"), tuple((ROWS | changed).values()), (("D", D), ("ROWS", TILE)), 4, 1, None)


@pytest.fixture(scope="module")
def compiled():
    """Kernels by name, each compiled for the architecture that brings out its fault."""
    from wm_export.native_compile import compile_kernels

    def function(name, parameters, **changed):
        return replace(copying(), function=("native_kernels", name), parameters=parameters, **changed)

    pair, matrices = (ROWS["x"], ROWS["y"]), (ROWS["x"], ROWS["x"], "ptr:float32:16")
    wanted = {
        "good": (copying(), "sm_90"),
        "scalar": (copying(x="ptr:bfloat16:1", y="ptr:bfloat16:1", stride="i32"), "sm_90"),
        "float": (function("scale_rows", (*pair, "fp32"), constants=(("D", D),)), "sm_90"),
        "scratch": (function("describe_rows", (*pair, "i32")), "sm_90"),
        "shared": (function("multiply", (*matrices, "i32"), constants=(("BLOCK", 128),), warps=8, stages=8), "sm_80"),
        "old": (copying(), "sm_80"),
    }
    return dict(zip(wanted, compile_kernels(list(wanted.values()), processes=1), strict=True))


def faults_of(kernel):
    from wm_export.native_lint import faults
    from wm_kernels.native import Rows

    return list(faults(kernel, {"copy_rows": Rows("D", ("ROWS", "D"))}))


@needs_triton
def test_a_kernel_that_can_travel_has_no_faults_and_tells_its_registers(compiled):
    from wm_kernels.cubin import architecture_of, registers_of

    assert faults_of(compiled["good"]) == []
    assert architecture_of(compiled["good"].cubin) == "sm_90"
    assert 1 <= registers_of(compiled["good"].cubin) <= 255
    assert b"native_kernels.py" not in compiled["good"].cubin, "line tables tell paths of the machine"


@needs_triton
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("scalar", "reads less than 16 bytes a thread"),
        ("float", "takes a parameter fp32"),
        ("scratch", "bytes of hidden global scratch"),
        ("shared", "bytes of shared memory, 166912 are there"),
    ],
)
def test_a_kernel_that_cannot_travel_is_refused_with_the_reason(compiled, name, fault):
    from wm_export.native_lint import check_kernel
    from wm_kernels.native import Rows

    (found,) = faults_of(compiled[name])
    assert fault in found
    with pytest.raises(ExportError, match=f"wm::rope: kernel {compiled[name].kernel.function[1]} for sm_"):
        check_kernel(compiled[name], {"copy_rows": Rows("D", ("ROWS", "D"))}, "rope")


@needs_triton
def test_a_kernel_for_another_architecture_is_refused_by_its_text_and_by_its_binary(compiled):
    strange = replace(compiled["old"], architecture="sm_90")
    assert faults_of(strange) == ["was made for sm_80, expected sm_90", "is a binary for sm_80, expected sm_90"]
    assert faults_of(replace(compiled["good"], cubin=compiled["old"].cubin)) == ["is a binary for sm_80, expected sm_90"]
    assert faults_of(replace(compiled["good"], cubin=b"\x7fELF")) == ["is no CUDA binary, expected one for sm_90"]


@needs_triton
def test_a_kernel_that_starts_early_and_does_not_wait_is_refused(compiled):
    good = compiled["good"]
    early = replace(good.kernel, constants=(*good.kernel.constants, ("DEPENDENT", True)))
    (found,) = faults_of(replace(good, kernel=early))
    assert found.startswith("starts before the kernel ahead of it has ended and does not wait")
    assert faults_of(replace(good, kernel=early, ptx=good.ptx + "griddepcontrol.wait;")) == []


@needs_triton
def test_scratch_of_a_profiler_is_refused(compiled):
    (found,) = faults_of(replace(compiled["good"], hidden={"global": 0, "profile": 128}))
    assert "128 bytes of hidden profile scratch" in found


@needs_triton
def test_a_kernel_that_does_not_compile_is_named():
    from wm_export.native_compile import compile_kernels

    with pytest.raises(ExportError, match="kernel copy_rows for sm_90 does not compile"):
        compile_kernels([(replace(copying(), constants=(("D", 500), ("ROWS", TILE))), "sm_90")])


@needs_triton
def test_plans_say_of_every_kernel_whether_it_waits_itself_for_the_one_ahead(compiled, tmp_path):
    from wm_export.native import _write_kernels

    import_module("native_kernels")  # whose text is part of ids
    good = compiled["good"]
    waiting, not_waiting = (
        replace(good, kernel=replace(good.kernel, constants=(("D", D), ("DEPENDENT", value), ("ROWS", TILE)))) for value in (True, False)
    )
    kernels = _write_kernels([good, waiting, not_waiting], tmp_path)
    assert {identity: entry["dependent"] for identity, entry in kernels.items()} == {
        good.kernel.id: False,
        waiting.kernel.id: True,
        not_waiting.kernel.id: False,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "c"
    save_checkpoint(folder, MODEL, init_params(MODEL, seed=0))
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    export_bundle(checkpoint, folder, targets=("native",), dtype="bf16", architectures=(90,))
    return folder


@needs_triton
def test_a_bundle_lists_every_kernel_and_what_it_was_made_by(bundle):
    from importlib.metadata import version

    opened = open_bundle(bundle, verify=True)
    plans = json.loads((bundle / "kernels/plans.json").read_text())
    files = {f"kernels/{file['file']}": file for kernel in plans["kernels"].values() for file in kernel["files"].values()}
    assert {name for name in opened.files if name.startswith("kernels/")} == {*files, "kernels/plans.json"}
    for name, file in files.items():
        data = (bundle / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file["sha256"], file["size"])
        assert file["shared"] <= 232448
        assert 1 <= file["registers"] <= 255
    native = opened.manifest["native"]
    assert native["architectures"] == plans["architectures"] == ["sm_90"]
    assert native["triton"] == plans["triton"] == version("triton")
    assert native["ops"] == ["attention_rope", "linear", "residual_rms_norm", "rope_angles"]
    assert native["without"] == []
    assert "model.onnx" not in opened.files


@needs_triton
def test_a_bundles_kernels_are_those_that_its_plans_launch(bundle):
    plans = json.loads((bundle / "kernels/plans.json").read_text())
    launched = {launch["kernel"] for op in plans["ops"] for variant in op["variants"] for launch in variant["launches"]}
    assert launched == set(plans["kernels"])
    assert {type(kernel["dependent"]) for kernel in plans["kernels"].values()} == {bool}
    for op in plans["ops"]:
        for variant in op["variants"]:
            for launch in variant["launches"]:
                pointers = [kind.startswith("ptr") for kind in plans["kernels"][launch["kernel"]]["parameters"]]
                assert pointers == [isinstance(value, str) and value not in op["symbols"] for value in launch["arguments"]]


@needs_triton
def test_kernels_are_added_to_a_bundle_and_replaced_in_it(bundle, tmp_path):
    changed = tmp_path / "b"
    shutil.copytree(bundle, changed)
    shutil.rmtree(changed / "kernels")
    (changed / "kernels").mkdir()
    (changed / "kernels" / "stale").write_text("of an older export")
    export_into(changed, targets=("native",), architectures=(90,))
    assert (changed / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert (changed / "kernels/plans.json").read_bytes() == (bundle / "kernels/plans.json").read_bytes()
    assert not (changed / "kernels/stale").exists()
    open_bundle(changed, verify=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("native",)}, "needs the architectures to compile for"),
        ({"targets": ("native",), "architectures": (91,)}, "unknown architecture 91"),
        ({"targets": ("onnx",), "architectures": (90,)}, "architectures are those of target native"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(options, message, tmp_path, monkeypatch):
    if find_spec("triton") is None:
        monkeypatch.setattr("wm_export.native.find_spec", lambda name: name)
    with pytest.raises(ExportError, match=message):
        export_bundle(tmp_path / "absent", tmp_path / "bundle", **options)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_triton_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("wm_export.native.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install triton"):
        export_bundle(tmp_path / "absent", tmp_path / "bundle", targets=("native",), architectures=(90,))


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")  # the interpreter's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("op", ["attention_rope", "scored_attention"])
def test_launches_of_native_plans_alone_compute_the_op(op, T, dtype):
    """Ops whose native launches are not eager's: eager rotates, or writes scores, by torch's own operations."""
    if missing() is not None or ON_CUDA:
        pytest.skip(missing() or "the interpreter's configurations are the CPU's")
    import native_launches

    use, given, reference = native_launches.CALLS[op](T, dtype)
    outputs = native_launches.launched(use, given)
    expected = reference(*wide(given.values()))
    for name, got, wanted in zip(("out", "k", "v", "score"), outputs, expected, strict=False):
        check(op if name == "out" else "rope", dtype, got, wanted)
