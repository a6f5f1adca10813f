"""What the parity page measures, against plainer measurements and planted faults. B rows, T tokens, V vocabulary."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults import noisy, onnx_reads_another_weight
from report_support import CALM, CONFIG, make_bundles
from wm_graph.checkpoints import load_tensors
from wm_graph.errors import BundleError
from wm_graph.model import forward
from wm_graph.oracle import oracle_forward
from wm_graph.params import params_from_flat
from wm_graph.state import zero_state
from wm_graph.taps import Taps
from wm_runtimes import open_bundle, open_session
from wm_runtimes.choice_names import choice_names
from wm_runtimes.choices import EagerRunner
from wm_runtimes.draws import SessionRunner, by_token, make_draws, run_draws
from wm_runtimes.error_growth import PROMPT, YARDSTICK, marked_steps, measure_growth
from wm_runtimes.onnxruntime_cpu import OnnxRuntimeCpuSession
from wm_runtimes.op_parity import measure_ops
from wm_runtimes.report import Report
from wm_runtimes.tap_runners import PromotedValues, RecordedOps, compared_names, op_of, rotated_pairs


@pytest.fixture(scope="module")
def bundles(made: Callable[..., tuple[Path, Path]]) -> dict[str, Path]:
    return make_bundles(made)


# What is planted wrong fails, and the value is named.


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("layers.0.mixer.in_proj", "layers.0.ssd_scan_rope.y"),
        ("layers.0.feed_forward.query", "layers.0.product_key_topk.weight"),
        ("layers.0.feed_forward.expert_up", "layers.0.expert_mix.y"),
        ("layers.1.mixer.qkv", "layers.1.rope.y"),
        ("layers.2.mixer.qkv", "layers.2.attention_rope.out"),
        ("layers.1.feed_forward_norm", "layers.1.residual_rms_norm.normed"),
    ],
)
def test_a_fault_is_named_by_the_first_value_over_its_limit(bundles: dict[str, Path], tmp_path: Path, weight: str, first: str) -> None:
    folder = shutil.copytree(bundles["float32"], tmp_path / "wrong")
    onnx_reads_another_weight(folder, weight, noisy)
    bundle = open_bundle(folder)
    rows = measure_ops(bundle, params_from_flat(CONFIG, load_tensors(folder)), ["eager", "onnxruntime-cpu"], draws=8)
    report = Report("wrong", (), tuple(rows), (), (), (), {}, {})
    found = report.culprit("onnxruntime-cpu", "float32")
    assert found is not None
    assert found.name == first
    assert report.culprit("eager", "float32") is None
    assert [line.split(" (")[0] for line in report.failures] == [f"onnxruntime-cpu, float32: first value over its limit {first}"]


def test_a_cache_that_drifts_shows_as_growth(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(bundles["calm"])
    params = params_from_flat(CALM, load_tensors(bundle.path))
    (right,) = (row for row in measure_growth(bundle, params, ["onnxruntime-cpu"], 64) if row.runtime != YARDSTICK)
    run_right = OnnxRuntimeCpuSession._run

    def drifting(self: Any, buffers: Any, *args: Any) -> Any:
        logits = run_right(self, buffers, *args)
        buffers.arrays["layers.1.v"][...] *= 1 + 1e-6
        return logits

    monkeypatch.setattr(OnnxRuntimeCpuSession, "_run", drifting)
    (wrong,) = (row for row in measure_growth(bundle, params, ["onnxruntime-cpu"], 64) if row.runtime != YARDSTICK)
    assert right.passed
    assert not wrong.passed
    assert wrong.rms[-1] > 2 * wrong.rms[0]


# The measurements themselves, against plainer ones.


def test_R_and_ulps_of_a_value_equal_those_computed_row_by_row(bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles["calm"])
    params = params_from_flat(CALM, load_tensors(bundle.path))
    tap = "layers.1.residual_rms_norm.normed"
    rows = measure_ops(bundle, params, ["onnxruntime-cpu"], draws=4, seed=3, longest_prompt=20, decode_steps=3)
    (measured,) = (one for row in rows for one in row.taps if one.name == tap)
    (draws,) = make_draws(CALM.vocab_size, 4, 3, 20, 3)
    errors: dict[str, list[np.ndarray[Any, Any]]] = {"onnx": [], "eager": []}
    ideal = []
    traces = {
        "onnx": run_draws(PromotedValues(bundle, 4, 23, [tap]), draws).choices[tap],
        "eager": run_draws(EagerRunner(CALM, params, 23, [tap]), draws).choices[tap],
    }
    for row, length in enumerate(draws.valid_B + draws.steps):
        taps = Taps(only=lambda name: name == tap)
        oracle_forward(CALM, params, torch.from_numpy(draws.tokens_BT[row : row + 1, :length]), taps=taps)
        ideal.append(taps.values[tap].numpy())
        for name, value in traces.items():
            errors[name].append(value[row, :length, 0] - ideal[-1])
    rms = {name: math.sqrt(np.mean(np.concatenate(parts) ** 2)) for name, parts in errors.items()}
    values = np.concatenate(ideal)
    below = max(rms["eager"], 2 * 2**-24 * math.sqrt(np.mean(values**2)))
    assert pytest.approx(rms["onnx"] / below, rel=1e-9) == measured.R
    assert measured.ulps == pytest.approx(np.abs(np.concatenate(errors["onnx"])).max() / (2**-24 * np.abs(values).max()), rel=1e-9)


def test_growth_equals_a_plain_loop_of_decode_steps(bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles["calm"])
    params = params_from_flat(CALM, load_tensors(bundle.path))
    (_, row) = measure_growth(bundle, params, ["onnxruntime-cpu"], 5, seed=2, most_rows=2)
    tokens_BT = np.random.default_rng(2).integers(0, CALM.vocab_size, (2, PROMPT + 5))
    ideal_BTV, _ = oracle_forward(CALM, params, torch.from_numpy(tokens_BT))
    with open_session(bundle, "onnxruntime-cpu", 2, PROMPT + 5) as session:
        session.prefill(tokens_BT[:, :PROMPT], select=np.tile(np.arange(PROMPT), (2, 1)))
        found = {step: session.decode(tokens_BT[:, PROMPT + step - 1]) for step in range(1, 6)}
    expected = [math.sqrt(np.mean((found[step] - ideal_BTV[:, PROMPT + step - 1].numpy()) ** 2)) for step in (1, 2, 4, 5)]
    assert row.steps == (1, 2, 4, 5)
    assert row.rms == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("runner", ["functional", "session"])
def test_recorded_ops_tell_the_same_bits_as_taps(bundles: dict[str, Path], runner: str) -> None:
    bundle = open_bundle(bundles["float32"])
    params = params_from_flat(CONFIG, load_tensors(bundle.path))
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
    valid_B, select_BS = np.array([12, 12]), np.array([[11], [6]])  # what ops give for padding is undefined
    taps = Taps(only=lambda name: True)
    arguments = (torch.from_numpy(tokens_BT), zero_state(CONFIG, 2, 12), torch.from_numpy(valid_B), torch.from_numpy(select_BS))
    with torch.no_grad():
        forward(CONFIG, params, *arguments, taps=taps)
    expected = {name: value.numpy() for name, value in taps.values.items()}
    names = (*compared_names(expected), *choice_names(CONFIG, 12))
    inner = EagerRunner(CONFIG, params, 12, ()) if runner == "functional" else SessionRunner(open_session(bundle, "eager", 2, 12))
    recorder = RecordedOps(inner, names, expected, rotated_pairs(expected))
    with recorder.recording():
        _, values = recorder.prefill(tokens_BT, valid_B, select_BS)
    assert set(values) == set(names)
    assert [name for name in names if not np.array_equal(values[name], expected[name])] == []
    assert {op_of(name) for name in names} == {op_of(name) for name in expected}


@pytest.mark.parametrize("kept_bytes", [16_000_000, 0])  # what a run binds is kept, unless its logits are large
def test_promoted_values_of_a_graph_are_those_of_its_names(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr("wm_runtimes.onnxruntime_session.KEPT_LOGITS_BYTES", kept_bytes)
    bundle = open_bundle(bundles["float16"])
    params = params_from_flat(CONFIG, load_tensors(bundle.path))
    (draws,) = make_draws(CONFIG.vocab_size, 2, 0, 10, 2)
    taps = Taps(only=lambda name: True)
    oracle_forward(CONFIG, params, torch.from_numpy(draws.tokens_BT), None, torch.from_numpy(draws.valid_B + 2), taps=taps)
    ideal = {name: value.numpy() for name, value in taps.values.items()}
    names = [name for name in compared_names(ideal) if not name.endswith(".state")]
    told = run_draws(PromotedValues(bundle, 2, 12, names), draws).choices
    for name, value in by_token({name: ideal[name] for name in names}, draws.tokens_BT.shape).items():
        assert np.allclose(told[name][draws.mask_BT], value[draws.mask_BT], atol=0.02 * np.abs(value).max()), name
    with pytest.raises(BundleError, match=r"no node named 'layers.9.rope'; export the bundle again"):
        PromotedValues(bundle, 2, 12, ["layers.9.rope.y"])


def test_steps_that_are_marked() -> None:
    assert marked_steps(512) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert marked_steps(12) == (1, 2, 4, 8, 12)
    assert marked_steps(1) == (1,)
