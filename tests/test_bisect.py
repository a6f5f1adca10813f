"""`wm bisect` names what is wrong: the op, the output and the step of every planted fault, in log-many runs, and nothing where all is well.

B rows, T tokens, D model width.
"""

import json
import math
import shlex
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from cli_support import wm
from fault_catalogue import CONFIGS, FAULTS
from faults import one_percent_off, onnx_reads_another_weight, resign
from helpers import COMPILED_FAMILIES, DTYPES, FAMILIES, OPTIONS, lively_params
from wm_export import export_bundle
from wm_export.weights import write_weights
from wm_graph import save_checkpoint
from wm_graph.cli.bisect_command import make_feed
from wm_runtimes import bisect as bisect_module
from wm_runtimes import open_bundle
from wm_runtimes.bisect import bisect
from wm_runtimes.findings import Finding, Report, parse_target
from wm_runtimes.onnxruntime_cpu import OnnxRuntimeCpuSession
from wm_runtimes.op_probes import OnnxProbe
from wm_runtimes.plain_model import PlainModel

ORT, PORTABLE = "onnxruntime-cpu", "onnxruntime-cpu:model.onnx"
CHEEMS, MAMBA2 = FAMILIES["cheems-tiny-moe"], FAMILIES["mamba2-tiny"]
Edit = Callable[[onnx.ModelProto], None]


def search(folder: Path, a: str, b: str, *, seed: int = 0, length: int = 80, steps: int = 3, other: Path | None = None) -> Report:
    """Bisect on three rows of unequal length, each prompt in two pieces."""
    bundle = open_bundle(folder)
    feed = make_feed(bundle, None, seed, 3, length, 2, steps)
    report = bisect(parse_target(bundle, a), parse_target(bundle if other is None else open_bundle(other), b), feed)
    # One run to see which step is off, halving over the ops of the step, one that records them all, one more where that finds nothing.
    assert report.runs <= math.log2(report.tensors) + 4
    return report


def found(folder: Path, a: str, b: str, **options: Any) -> Finding:
    finding = search(folder, a, b, **options).finding
    assert finding is not None
    return finding


# What is right is left alone.


@pytest.mark.parametrize(("name", "dtype"), [*product(FAMILIES, DTYPES), *product(OPTIONS, DTYPES[:1])])
def test_nothing_is_found_between_sound_runtimes(made, name: str, dtype: str) -> None:
    _, bundle = made((FAMILIES | OPTIONS)[name], dtype)
    for a, b, seed in (("eager", ORT, 1), (PORTABLE, "oracle", 2)):
        report = search(bundle, a, b, seed=seed, length=50, steps=1)
        assert report.finding is None, report.finding
        assert report.runs >= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns about itself
def test_nothing_is_found_in_a_compiled_model(made) -> None:
    torch._dynamo.reset()
    assert search(made(COMPILED_FAMILIES["cheems-tiny-moe"])[1], "compiled", "oracle", steps=1).finding is None


def test_nothing_is_found_where_half_precision_chooses_other_experts(made) -> None:
    _, folder = made(FAMILIES["jamba-tiny"], "fp16")
    bundle = open_bundle(folder)
    model, feed = PlainModel(bundle), make_feed(bundle, None, 7, 8, 80, 2, 2)
    half, double = model.run(feed, False), model.run(feed, True)
    names = [name for name in half[0].values if name.endswith(".expert")]
    assert any(not torch.equal(one.values[name], two.values[name]) for one, two in zip(half, double, strict=True) for name in names)
    report = bisect(parse_target(bundle, "eager"), parse_target(bundle, ORT), feed)
    assert report.finding is None, report.finding


def test_nothing_is_found_between_dtypes_of_one_checkpoint(made) -> None:
    single, half = (made(MAMBA2, dtype)[1] for dtype in DTYPES)
    assert search(single, "eager", ORT, other=half).finding is None
    assert search(single, ORT, ORT, other=half).finding is None


# Faults of our own, each where one thing decides.


@pytest.fixture
def edited(made, tmp_path: Path) -> Callable[..., Path]:
    """A function: (configuration, edit of model.ort.onnx) -> a bundle with that graph."""

    def make(cfg: Any, edit: Edit, dtype: str = "fp32") -> Path:
        copy = Path(shutil.copytree(made(cfg, dtype)[1], tmp_path / "edited"))
        model = onnx.load(str(copy / "model.ort.onnx"), load_external_data=False)
        edit(model)
        (copy / "model.ort.onnx").write_bytes(model.SerializeToString())
        resign(copy, "model.ort.onnx")
        return copy

    return make


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.name == name)


def behind(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes behind the maker of a value: they read `right` and make the value."""
    place, maker = next((place, one) for place, one in enumerate(model.graph.node) if name in one.output)
    maker.output[list(maker.output).index(name)] = "right"
    for offset, one in enumerate(nodes):
        model.graph.node.insert(place + 1 + offset, one)


def in_op(model: onnx.ModelProto, call: str, output: int, text: str) -> None:
    """Give one call of an op a body of its own, where the nodes of the text make an output `y` of what it was, `x`."""
    one = node(model, call)
    body = onnx.FunctionProto()
    body.CopyFrom(next(function for function in model.functions if (function.name, function.overload) == (one.op_type, one.overload)))
    body.overload = one.overload = "fault"
    name = body.output[output]
    maker = next(item for item in body.node if name in item.output)
    maker.output[list(maker.output).index(name)] = "x"
    parsed = onnx.parser.parse_function(f'<opset_import: ["" : 23], domain: "fault"> fault (x) => (y) {{ {text} }}')
    for item in parsed.node:
        item.output[:] = [name if output == "y" else output for output in item.output]
        body.node.append(item)
    model.functions.append(body)


def scaled(model: onnx.ModelProto, tensor: str, factor: float) -> None:
    """The first output of a call, times a factor."""
    in_op(model, tensor.rpartition(".")[0], 0, f"f = Constant <value_float = {factor}> ()  y = Mul (x, f)")


def test_a_wrong_output_deep_in_the_model_is_named(edited) -> None:
    bundle = edited(CHEEMS, lambda model: scaled(model, "layers.5.expert_mix.y", 1.25))
    finding = found(bundle, "eager", ORT)
    assert (finding.tensor, finding.op, finding.output, finding.module) == (
        "layers.5.expert_mix.y", "expert_mix", "y", "layers.5.feed_forward"
    )  # fmt: skip
    assert (finding.step_number, finding.step, finding.runtime) == (0, "prefill 1 of 2", ORT)
    assert finding.b == pytest.approx(1.25 * finding.expected, rel=1e-4)
    assert finding.a == pytest.approx(finding.expected, rel=1e-2)
    assert finding.error == pytest.approx(abs(finding.b - finding.expected))
    assert finding.R is not None
    assert finding.R_limit < finding.R


def test_an_error_too_small_to_reach_the_logits_is_found(edited) -> None:
    bundle = edited(CHEEMS, lambda model: scaled(model, "layers.6.expert_mix.y", 1 + 1e-5))
    report = search(bundle, "eager", ORT)
    assert report.finding is not None
    assert report.finding.tensor == "layers.6.expert_mix.y"
    assert report.runs <= 3


def test_the_first_of_two_faults_is_named(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        scaled(model, "layers.3.expert_mix.y", 2.0)
        in_op(model, "layers.6.product_key_topk", 1, "y = Neg (x)")

    assert found(edited(CHEEMS, edit), "eager", ORT).tensor == "layers.3.expert_mix.y"


def test_a_state_that_goes_wrong_late_is_named_at_the_step_that_wrote_it(edited) -> None:
    """The state is spoilt from position 81 on: only the second decode step writes a wrong one, in the full row, and the third shows it."""

    def edit(model: onnx.ModelProto) -> None:
        for name, value in (("least", 81), ("times", np.float32(1.5)), ("once", np.float32(1.0)), ("axes", [1, 2, 3])):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"fault/{name}"))
        make = helper.make_node
        behind(model, "layers.2.ssd.next", [
            make("GreaterOrEqual", ["position", "fault/least"], ["fault/late"]),
            make("Where", ["fault/late", "fault/times", "fault/once"], ["fault/factor_B"]),
            make("Unsqueeze", ["fault/factor_B", "fault/axes"], ["fault/factor"]),
            make("Mul", ["right", "fault/factor"], ["layers.2.ssd.next"]),
        ])  # fmt: skip

    finding = found(edited(CHEEMS, edit), "eager", ORT, steps=4)
    assert (finding.tensor, finding.op, finding.step) == ("layers.2.ssd_scan_rope.state", "ssd_scan_rope", "decode step 2")
    assert finding.index[0] == 2


def test_exchanged_states_are_named(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        for one in model.graph.node:
            one.output[:] = [
                {"layers.1.ssd.next": "layers.2.ssd.next", "layers.2.ssd.next": "layers.1.ssd.next"}.get(n, n) for n in one.output
            ]

    finding = found(edited(CHEEMS, edit), "eager", ORT)
    assert (finding.tensor, finding.step_number) == ("layers.1.ssd_scan_rope.state", 0)


def test_a_weight_that_only_the_graph_reads_otherwise_is_named_between_its_ops(made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made(CHEEMS)[1], tmp_path / "copy"))
    onnx_reads_another_weight(copy, "layers.4.feed_forward.down", one_percent_off)
    finding = found(copy, "eager", ORT)
    assert (finding.op, finding.module, finding.tensor.rpartition(".")[0]) == ("model", "layers.5", "layers.5.ssd_scan_rope")
    assert "layers.4.feed_forward.down" in finding.reads


def test_a_value_that_is_changed_on_its_way_is_named_between_the_ops(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        behind(model, "layers.5.expert_mix.y", [helper.make_node("Neg", ["right"], ["layers.5.expert_mix.y"])])

    finding = found(edited(CHEEMS, edit), "eager", ORT)
    assert (finding.op, finding.tensor) == ("model", "layers.6.ssd_scan_rope.x_in")


def test_a_missing_residual_is_named_between_its_ops(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        scale = next(one for one in model.graph.node if "layers.3.feed_forward_residual" in one.input)
        (stream,) = (name for name in scale.input if name != "layers.3.feed_forward_residual")
        scale.CopyFrom(helper.make_node("Identity", [stream], [scale.output[0]]))

    finding = found(edited(CHEEMS, edit), "eager", ORT)
    assert (finding.op, finding.module) == ("model", "layers.4")
    assert "layers.3.feed_forward_residual" in finding.reads


def test_where_a_value_is_no_number_is_found(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        in_op(model, "layers.5.expert_mix", 0, "zero = Sub (x, x)  y = Div (zero, zero)")

    finding = found(edited(CHEEMS, edit), "eager", ORT)
    assert finding.tensor == "layers.5.expert_mix.y"


def test_a_fault_in_half_precision_is_named(edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        rounded = [("a", onnx.TensorProto.BFLOAT16), ("layers.3.ssd.next", onnx.TensorProto.FLOAT)]
        behind(model, "layers.3.ssd.next", [
            helper.make_node("Cast", [source], [name], to=kind)
            for source, (name, kind) in zip(("right", "a"), rounded, strict=True)
        ])  # fmt: skip

    assert found(edited(MAMBA2, edit, "fp16"), "eager", ORT).tensor == "layers.3.ssd_scan.state"


def test_a_weight_that_two_bundles_hold_differently_is_named(made, tmp_path: Path) -> None:
    right = made(MAMBA2)[1]
    copy = Path(shutil.copytree(right, tmp_path / "copy"))
    weights = {name: value.clone() for name, value in load_file(copy / "model.safetensors").items()}  # the file is written over
    name = "layers.3.mixer.in_proj"
    weights[name][5, 7] += 0.01
    write_weights(weights, copy / "model.safetensors")
    resign(copy, "model.safetensors")
    finding = found(right, ORT, ORT, other=copy)
    assert (finding.tensor, finding.op, finding.step, finding.index) == (name, "parameter", "weights", (5, 7))
    assert finding.b == pytest.approx(finding.a + 0.01, abs=1e-6)


def test_an_error_that_recording_everything_hides_is_named_by_the_search(made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a fusion would that outputs prevent: layer 3 and all after it are wrong, but not where two ops in a row are recorded."""

    class Shy(OnnxProbe):
        def run(self, feed, wanted, last=None):
            steps = super().run(feed, wanted, last)
            names = [call.name for call in self._calls]
            if all(wanted(0, name) for name in names):
                return steps
            late = names[names.index("layers.3.gated_rms_norm") :]
            for step in steps:
                step.logits_BTV = step.logits_BTV * 1.5
                for name in step.values:
                    if name.rpartition(".")[0] in late:
                        step.values[name] = step.values[name] * 1.5
            return steps

    monkeypatch.setattr(bisect_module, "OnnxProbe", Shy)
    finding = found(made(MAMBA2)[1], "eager", ORT)
    assert (finding.tensor, finding.step_number) == ("layers.3.gated_rms_norm.out", 0)


def test_what_the_session_does_around_its_graph_is_named_so(made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt of one row runs in blocks, which no session that tells values does."""
    right = OnnxRuntimeCpuSession._run

    def backwards(self, buffers, start, position_B, tokens_BT, valid_B, select_BS):
        blocks = tokens_BT.shape[1] > self._block and len(tokens_BT) == 1
        return right(self, buffers, start, position_B, tokens_BT[:, ::-1].copy() if blocks else tokens_BT, valid_B, select_BS)

    monkeypatch.setattr(OnnxRuntimeCpuSession, "_run", backwards)
    bundle = open_bundle(made(FAMILIES["llama-tiny"])[1])
    feed = make_feed(bundle, None, 0, 1, 300, 1, 0)
    finding = bisect(parse_target(bundle, "eager"), parse_target(bundle, ORT), feed).finding
    assert finding is not None
    assert (finding.op, finding.step, finding.runtime) == ("session", "prefill", ORT)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["mamba2-tiny", "jamba-tiny"])
def test_rounded_weights_are_no_finding_in_either_order(made, name: str, order: int) -> None:
    bundles = [made(FAMILIES[name], dtype)[1] for dtype in DTYPES]
    assert search(bundles[order], "eager", "eager", other=bundles[1 - order], length=20, steps=1).finding is None


# The catalogue of planted faults.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns about itself
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.runtime}-{fault.op}-{fault.name}")
def test_every_fault_of_the_catalogue_is_named(made, tmp_path: Path, fault: Any) -> None:
    _, bundle = made(CONFIGS[fault.family], fault.dtype)
    if fault.runtime == "compiled":
        torch._dynamo.reset()
    with fault.planted(bundle, tmp_path) as folder:
        side = f"{fault.runtime}:{fault.graph}" if fault.graph else fault.runtime
        finding = found(folder, "oracle", side, length=400 if fault.shows == "far" else 80, steps=1)
    assert finding.op == fault.op, finding
    assert finding.runtime in (side, fault.runtime)


# The command.


def test_the_command_prints_the_finding_and_a_command_that_finds_it_again(edited, capfd) -> None:
    bundle = edited(MAMBA2, lambda model: scaled(model, "layers.2.ssd_scan.y", 1.1))
    first = wm(capfd, "bisect", bundle, "--steps", 2)
    assert first.code == 1
    assert first.err.count("\n") == 1
    fields = dict(line.split("  ", 1) for line in first.out.splitlines()[2:])
    shown = {name.strip(): value.strip() for name, value in fields.items()}
    assert (shown["module"], shown["op"], shown["output"], shown["step"]) == ("layers.2.mixer", "ssd_scan", "y", "prefill 1 of 2")
    again = wm(capfd, *shlex.split(shown["reproduce"])[1:])
    assert again.code == 1
    assert again.out.splitlines()[2:-1] == first.out.splitlines()[2:-1]


@pytest.mark.parametrize("given", [("--tokens", "5,9,200,33,7,81,2"), ("--seed", 3, "--rows", 1, "--length", 9, "--pieces", 1)])
def test_json_tells_the_same_and_can_be_reproduced(edited, capfd, given: tuple[Any, ...]) -> None:
    twice_alone = """
        rows = Shape <start = 0, end = 1> (x)  one = Constant <value_ints = [1]> ()  single = Equal (rows, one)
        two = Constant <value_float = 2.0> ()  unit = Constant <value_float = 1.0> ()
        f = Where (single, two, unit)  y = Mul (x, f)
    """
    bundle = edited(MAMBA2, lambda model: in_op(model, "layers.1.gated_rms_norm", 0, twice_alone))
    outcome = wm(capfd, "bisect", bundle, "--a", "oracle", *given, "--json")
    assert outcome.code == 1
    finding = outcome.json["finding"]
    assert (finding["tensor"], finding["step"]) == ("layers.1.gated_rms_norm.out", "decode step 1")
    assert finding["b"] == pytest.approx(2 * finding["expected"], rel=1e-4)
    again = wm(capfd, *shlex.split(outcome.json["reproduce"])[1:], "--json")
    assert again.code == 1
    for name, value in finding.items():
        assert again.json["finding"][name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert "--steps 4" in outcome.json["reproduce"]  # fewer would make a smaller session, in which a fault may not show


def test_the_command_says_that_nothing_was_found(made, capfd) -> None:
    _, bundle = made(MAMBA2)
    outcome = wm(capfd, "bisect", bundle, "--b", PORTABLE, "--length", 20, "--steps", 1)
    assert (outcome.code, outcome.err) == (0, "")
    assert "nothing out of budget between eager and onnxruntime-cpu:model.onnx" in outcome.out
    told = wm(capfd, "bisect", bundle, "--length", 20, "--steps", 1, "--json").json
    assert (told["finding"], told["reproduce"]) == (None, None)
    assert told["tensors"] > 100
    assert json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--b", "eager"), "both sides are eager"),
        (("--b", "tensorrt"), "unknown runtime 'tensorrt'"),
        (("--b", "eager:model.onnx"), "eager runs no graph"),
        (("--b", "onnxruntime-cpu:other.onnx"), "no graph 'other.onnx'"),
        (("--tokens", "1,x"), "'x' is no token id"),
        (("--tokens", "1,99999"), "99999 is outside"),
        (("--tokens", ""), "no token id"),
        (("--tokens", "1", "--prompt", "a"), "give one"),
        (("--prompt", "a"), "tokenizer"),
        (("--length", "1"), "pieces"),
        (("--steps", "-1"), "--steps"),
        (("--steps", "18000000"), "16777216 positions"),
    ],
)
def test_wrong_use_is_one_line(made, capfd, arguments: tuple[str, ...], words: str) -> None:
    outcome = wm(capfd, "bisect", made(MAMBA2)[1], *arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert words in outcome.err


def test_bundles_of_two_configurations_are_refused(made, capfd) -> None:
    outcome = wm(capfd, "bisect", made(MAMBA2)[1], "--b-bundle", made(CHEEMS)[1])
    assert outcome.code == 2
    assert "configuration" in outcome.err


def test_a_runtime_that_cannot_run_the_bundle_is_code_3(tmp_path: Path, capfd) -> None:
    save_checkpoint(tmp_path / "model", MAMBA2, lively_params(MAMBA2))
    export_bundle(tmp_path / "model", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    stored = {name: value.clone() for name, value in load_file(tmp_path / "bundle" / "model.safetensors").items()}
    weights = {name: value if name.endswith("A_log") else value.bfloat16() for name, value in stored.items()}
    save_file(weights, tmp_path / "bundle" / "model.safetensors")
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps(manifest | {"dtype": "bfloat16"}))
    resign(tmp_path / "bundle", "model.safetensors")
    outcome = wm(capfd, "bisect", tmp_path / "bundle", "--length", 9)
    assert outcome.code == 3, outcome
    assert "bfloat16" in outcome.err
    report = search(tmp_path / "bundle", "eager", "oracle")
    assert report.finding is None, report.finding
