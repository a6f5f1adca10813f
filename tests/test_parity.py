"""Parity and check: what is right passes, what is planted wrong fails. B rows, T tokens, K kv heads, R heads, k picks."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import noisy, one_percent_off, onnx_reads_another_weight, resign
from helpers import MODELS, lively_params
from wm_export import export_bundle
from wm_export.weights import write_weights
from wm_graph import save_checkpoint
from wm_graph.errors import BundleError, CheckpointError, InputError, RuntimeUnavailableError
from wm_graph.tolerances import MODEL_LIMITS, OP_LIMITS, model_limit, op_limit, render, score_budget
from wm_runtimes import open_bundle
from wm_runtimes.check import check_bundle
from wm_runtimes.draws import make_draws
from wm_runtimes.onnxruntime_cpu import OnnxRuntimeCpuSession
from wm_runtimes.parity import ParityReport, ParityRow, measure_parity
from wm_runtimes.torch_runtimes import EagerSession

# Every op, both kinds of choices, and a window shorter than the draws.
LAYERS = (("ssd", "cdmoe"), ("ssd", "mlp"), ("dynamic_mask_attention", "cdmoe"), ("attention", "mlp"))
CONFIG = replace(MODELS["window"], layers=LAYERS, name="all-ops", vocab_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    save_checkpoint(root / "model", CONFIG, lively_params(CONFIG))
    export_bundle(root / "model", root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="module")
def half_folder(folder: Path) -> Path:
    export_bundle(folder.parent / "model", folder.parent / "half", dtype="fp16")
    return folder.parent / "half"


def measure(folder: Path, *runtimes: str, **options: object) -> ParityReport:
    return measure_parity(open_bundle(folder), runtimes, draws=8, longest_prompt=70, decode_steps=3, **options)  # type: ignore[arg-type]


# What is right passes.


@pytest.mark.parametrize("graph", ["model.ort.onnx", "model.onnx"])
def test_right_runtimes_pass_and_eager_is_its_own_yardstick(folder: Path, graph: str) -> None:
    report = measure(folder, "eager", "onnxruntime-cpu", options={"onnxruntime-cpu": {"graph": graph}})
    eager, onnx_row = report.rows
    assert report.passed
    assert pytest.approx(1.0, abs=1e-6) == eager.R
    assert 0 < onnx_row.R <= onnx_row.R_limit
    assert report.draws == 8
    assert onnx_row.outputs == report.tokens * CONFIG.vocab_size
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["passed"] is True


def test_half_precision_passes_with_choices_of_its_own(half_folder: Path) -> None:
    report = measure_parity(open_bundle(half_folder), ["eager", "onnxruntime-cpu"], draws=16, longest_prompt=70, decode_steps=3)
    assert report.passed, report
    assert report.rows[0].R <= 1 + 1e-6  # eager against itself, above the floor of a few u
    assert 0 < report.rows[0].choice_rate < report.rows[0].choice_rate_limit


def test_equal_seeds_measure_the_same(folder: Path) -> None:
    first, second = (measure_parity(open_bundle(folder), ["eager"], draws=2, seed=3, longest_prompt=9, decode_steps=1) for _ in range(2))
    assert replace(first.rows[0], tokens_per_s=0.0) == replace(second.rows[0], tokens_per_s=0.0)


def test_progress_rises_from_zero(folder: Path) -> None:
    seen: list[float] = []
    measure_parity(open_bundle(folder), ["eager"], 2, progress=lambda text, done: seen.append(done), longest_prompt=9, decode_steps=1)
    assert seen[0] == 0.0
    assert seen == sorted(seen)
    assert seen[-1] <= 1.0


# What is drawn.


@pytest.mark.parametrize("vocab_size", [512, 2**17], ids=["rows of eight", "fewer rows for their logits"])
@pytest.mark.parametrize(
    ("longest", "steps", "farthest", "positions"),
    [(79, 8, 0, None), (79, 8, 271, None), (79, 8, 271, 60), (9, 0, 0, None), (3, 0, 0, None), (2, 1, 5, None), (1, 0, 0, None)],
)
def test_no_padded_piece_reaches_beyond_the_longest_row(
    vocab_size: int, longest: int, steps: int, farthest: int, positions: int | None
) -> None:
    cut = 0
    for seed, draws in product(range(100), (2, 4, 17, 24)):
        groups = make_draws(vocab_size, draws, seed, longest, steps, farthest, positions)
        assert sum(len(group.valid_B) for group in groups) >= draws
        for group in groups:
            length = group.tokens_BT.shape[1]
            assert length == group.valid_B.max() + group.steps <= (positions or length)
            assert group.valid_B.min() >= 1
            if group.first_B is not None:
                assert (group.first_B + (group.valid_B - group.first_B).max()).max() <= length
                assert group.first_B[0] == 0
                assert len(group.valid_B) == 2 or group.first_B[1] == group.valid_B[1]
                cut += 1
    assert cut or longest == 1


@pytest.mark.parametrize("positions", [1, 2, 5, 17, 60, 87, 10**6])
def test_draws_use_the_positions_there_are_and_keep_both_prompts_and_steps(positions: int) -> None:
    for group in make_draws(512, 16, 0, 79, 8, positions=positions):
        assert group.tokens_BT.shape[1] == min(positions, 87)
        assert group.steps == min(8, positions // 2)


# What is planted wrong fails.


def change_a_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, patch: onnx_reads_another_weight(folder, name, change)


def prefill_off_by_one(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A chunk that believes it starts one position later than it does."""
    run = OnnxRuntimeCpuSession._run

    def wrong(self, buffers, start, position_B, tokens_BT, valid_B, select_BS):
        if tokens_BT.shape[1] > 1:
            position_B = position_B + 1
        return run(self, buffers, start, position_B, tokens_BT, valid_B, select_BS)

    patch.setattr(OnnxRuntimeCpuSession, "_run", wrong)


def swapped_states(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Two recurrent states of equal shape change places after every call."""
    run = OnnxRuntimeCpuSession._run

    def wrong(self, buffers, *args):
        logits = run(self, buffers, *args)
        first, second = buffers.arrays["layers.0.ssd"], buffers.arrays["layers.1.ssd"]
        first[...], second[...] = second.copy(), first.copy()
        return logits

    patch.setattr(OnnxRuntimeCpuSession, "_run", wrong)


def shifted_logits(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """One logit of one row is off by a little more than the limit."""
    run = OnnxRuntimeCpuSession._run

    def wrong(self, *args):
        logits = run(self, *args)
        logits[0, 0, 5] += 1.5e-4
        return logits

    patch.setattr(OnnxRuntimeCpuSession, "_run", wrong)


def nan_logit(folder: Path, patch: pytest.MonkeyPatch) -> None:
    run = OnnxRuntimeCpuSession._run

    def wrong(self, *args):
        logits = run(self, *args)
        logits[-1, -1, -1] = math.nan
        return logits

    patch.setattr(OnnxRuntimeCpuSession, "_run", wrong)


FAULTS = {
    "one layer's weight 1 percent off": change_a_weight("layers.1.mixer.out_proj", one_percent_off),
    "expert table 1 percent off": change_a_weight("layers.2.feed_forward.expert_up", one_percent_off),
    "prefill one position off": prefill_off_by_one,
    "swapped states": swapped_states,
    "one logit off": shifted_logits,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    FAULTS[fault](copy, monkeypatch)
    report = measure_parity(open_bundle(copy), ["onnxruntime-cpu"], draws=4, longest_prompt=40, decode_steps=3)
    assert not report.passed, report
    assert report.rows[0].failures
    assert json.dumps(report.to_dict(), allow_nan=False)
    check = check_bundle(copy, ["onnxruntime-cpu"])
    assert not check.passed, check
    assert json.dumps(check.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["layers.0.feed_forward.keys", "layers.2.mixer.dt"])
def test_choices_by_other_scores_fail_as_choices(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    change_a_weight(name, noisy)(copy, monkeypatch)
    (row,) = measure_parity(open_bundle(copy), ["onnxruntime-cpu"], draws=4, longest_prompt=40, decode_steps=3).rows
    assert row.choice_rate > row.choice_rate_limit
    assert row.choice_excess > 1


def test_wrong_eager_fails_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = EagerSession._forward
    monkeypatch.setattr(EagerSession, "_forward", lambda self, *args: forward(self, *args) * 1.001)
    assert not measure_parity(open_bundle(folder), ["eager"], draws=2, longest_prompt=9, decode_steps=1).passed


def test_nothing_compared_is_no_pass(folder: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(InputError, match="no runtime"):
        measure_parity(bundle, [])
    with pytest.raises(InputError, match="draws is 0"):
        measure_parity(bundle, ["eager"], draws=0)
    assert not ParityReport("x", 0, 0, 0.0, 0.0, ()).passed
    assert not ParityRow("eager", "float32", 0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0).passed


@pytest.mark.parametrize("field", ["R", "max_abs", "choice_rate", "choice_excess"])
def test_nan_never_passes(field: str) -> None:
    row = ParityRow("eager", "float32", 9, 1.0, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    assert row.passed
    bad = replace(row, **{field: math.nan})
    assert not bad.passed
    assert bad.to_dict()[field] is None


# check


def test_check_passes_and_needs_no_torch_for_what_is_near(folder: Path) -> None:
    report = check_bundle(folder, ["eager", "onnxruntime-cpu"])
    assert report.passed
    whats = [row.what for row in report.rows]
    assert whats[:2] == ["files", "eager"]
    assert {"onnxruntime-cpu model.onnx", "onnxruntime-cpu model.ort.onnx in place"} <= set(whats)


def test_check_follows_the_choices_of_half_precision(half_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = replace(model_limit("float16", "onnxruntime-cpu"), max_abs=1e-9)
    monkeypatch.setattr("wm_runtimes.check.model_limit", lambda dtype, runtime: limit)
    report = check_bundle(half_folder, ["onnxruntime-cpu"])
    assert not report.passed  # too strict a limit, but the choices were followed and judged
    assert all(row.choice_excess <= 1.0 for row in report.rows)


def test_check_names_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors: SHA-256"):
        check_bundle(copy)


def test_nan_logits_are_damaged_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_logit(folder, monkeypatch)
    with pytest.raises(CheckpointError, match="not finite in row"):
        measure_parity(open_bundle(folder), ["onnxruntime-cpu"], draws=2, longest_prompt=8, decode_steps=1)
    with pytest.raises(CheckpointError, match="not finite in row"):
        check_bundle(folder, ["onnxruntime-cpu"])


@pytest.mark.parametrize("change", [lambda logits: logits + 1, torch.randn_like], ids=["shifted", "random"])
def test_golden_logits_of_another_model_fail(folder: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Also on a model that chooses: following the runtime's choices must not replace the golden logits."""
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    golden = load_file(copy / "golden.safetensors")
    golden["logits"] = change(golden["logits"])
    save_file(golden, copy / "golden.safetensors")
    resign(copy, "golden.safetensors")
    report = check_bundle(copy, ["eager", "onnxruntime-cpu"])
    assert not report.passed
    assert all(not row.passed for row in report.rows if "golden logits" in row.detail)
    assert sum("golden logits" in row.detail for row in report.rows) == 3


def test_other_weights_than_the_golden_ones_fail(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    write_weights({name: weight * 1.3 for name, weight in weights.items()}, copy / "model.safetensors")
    resign(copy, "model.safetensors")
    assert not check_bundle(copy, ["eager", "onnxruntime-cpu"]).passed


@pytest.mark.parametrize(("field", "value"), [("parameters", 7), ("d_ff", 4096), ("keep_window", "state")])
def test_manifest_that_does_not_fit_the_weights_is_one_line(folder: Path, tmp_path: Path, field: str, value: Any) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    if value == "state":
        manifest["state"].pop()
    elif field in manifest:
        manifest[field] = value
    else:
        manifest["config"][field] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        check_bundle(copy, ["eager"])


@pytest.mark.parametrize("change", ["missing", "shape", "nan"])
def test_unusable_golden_data_is_one_line(folder: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(folder, copy)
    golden = load_file(copy / "golden.safetensors")
    if change == "missing":
        del golden["prefill"]
    elif change == "shape":
        golden["logits"] = golden["logits"][:, :-1].contiguous()
    else:
        golden["logits"][0, 0, 0] = math.nan
    save_file(golden, copy / "golden.safetensors")
    resign(copy, "golden.safetensors")
    with pytest.raises(BundleError, match=r"golden") as caught:
        check_bundle(copy, ["eager"])
    assert "\n" not in str(caught.value)


def test_unavailable_runtimes_are_listed_unless_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wm_runtimes.readiness.availability", lambda name: None if name == "eager" else "not here today")
    report = check_bundle(folder)
    assert report.passed
    assert report.unavailable == dict.fromkeys(("compiled", "onnxruntime-cpu", "onnxruntime-cuda"), "not here today")
    with pytest.raises(RuntimeUnavailableError, match="not here today"):
        check_bundle(folder, ["onnxruntime-cpu"])
    monkeypatch.undo()
    with pytest.raises(InputError, match="unknown runtime"):
        check_bundle(folder, ["tensorrt-9"])


# The table.


def test_the_document_is_the_table() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tolerances.md").read_text(encoding="utf-8")
    assert text == render(), "run: python -m wm_graph.tolerances > docs/tolerances.md"


def test_the_table_knows_every_op_and_runtime() -> None:
    from wm_graph.taps import OP_OUTPUTS
    from wm_runtimes import RUNTIMES

    assert {limit.op for limit in OP_LIMITS} == set(OP_OUTPUTS)
    assert {limit.runtime for limit in OP_LIMITS} == {*RUNTIMES, "triton"}  # the kernels of the torch runtimes on CUDA
    assert {limit.runtime for limit in MODEL_LIMITS} == set(RUNTIMES)
    assert all(limit.reason for limit in (*OP_LIMITS, *MODEL_LIMITS))
    assert op_limit("attention", "float32", "eager").relative == pytest.approx(16 * 2**-24)
    assert score_budget("argmax", "float32").relative == pytest.approx(2e-4)
