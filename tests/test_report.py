"""The parity page: its numbers are those measured, what is wrong shows, and the file needs nothing else. B rows, T tokens, V vocabulary."""

import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import one_percent_off, onnx_reads_another_weight
from report_support import Page, make_bundles, read
from wm_graph.cli import run
from wm_graph.errors import InputError, RuntimeUnavailableError
from wm_runtimes import open_bundle, open_session
from wm_runtimes.error_growth import YARDSTICK
from wm_runtimes.op_parity import OpRow
from wm_runtimes.report import Report, measure_report
from wm_runtimes.report_charts import digits
from wm_runtimes.report_page import render_page

STEPS = 12


@pytest.fixture(scope="module")
def bundles(made: Callable[..., tuple[Path, Path]]) -> dict[str, Path]:
    return make_bundles(made)


@dataclass(frozen=True)
class Outcome:
    """What `wm parity --html --json` gave."""

    code: int
    out: str
    err: str
    page: Page

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def parity(file: Path, *argv: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(["parity", *map(str, argv), "--html", str(file), "--json"])
    return Outcome(code, out.getvalue(), err.getvalue(), read(file.read_text(encoding="utf-8") if file.exists() else ""))


@pytest.fixture(scope="module")
def outcome(bundles: dict[str, Path]) -> Outcome:
    three = (bundles["float32"], bundles["float16"], bundles["bfloat16"])
    file = bundles["bfloat16"].parent / "page.html"
    return parity(file, *three, "--runtimes", "eager,onnxruntime-cpu", "--draws", 8, "--steps", STEPS)


def number(text: str) -> float:
    return {"NaN": math.nan, "∞": math.inf}.get(text) or float(text.removeprefix("✗ ").split()[0])


def shown(text: str, value: float, factor: float = 1.0) -> bool:
    """A number on the page is the measured one to three digits."""
    return number(text) == pytest.approx(factor * value, rel=5.1e-3)


# What is on the page is what was measured.


def test_the_page_shows_every_model_with_its_numbers(outcome: Outcome) -> None:
    rows = [row for model in outcome.json["models"] for row in model["rows"]]
    assert {(row["dtype"], row["runtime"]) for row in rows} == {
        ("float32", "eager"),
        ("float32", "onnxruntime-cpu"),
        ("float16", "eager"),
        ("float16", "onnxruntime-cpu"),
        ("bfloat16", "eager"),
    }
    for row in rows:
        texts = outcome.page.texts[f"model|{row['dtype']}|{row['runtime']}"]
        _, _, verdict, R, R_limit, max_abs, max_abs_limit, rate, rate_limit, _ = texts
        assert shown(R, row["R"])
        assert shown(R_limit, row["R_limit"])
        assert shown(max_abs, row["max_abs"])
        assert shown(max_abs_limit, row["max_abs_limit"])
        assert shown(rate, row["choice_rate"], 100)
        assert shown(rate_limit, row["choice_rate_limit"], 100)
        assert verdict == ("passed" if row["passed"] else "✗ FAILED")


def test_the_page_shows_R_and_ulp_of_every_op_and_value(outcome: Outcome) -> None:
    expected: dict[str, tuple[float, float]] = {}
    for row in outcome.json["ops"]:
        expected[f"op|{row['op']}|{row['dtype']}|{row['runtime']}"] = row["R"], row["ulps"]
        for tap in row["taps"]:
            expected[f"value|{tap['name']}|{row['dtype']}|{row['runtime']}"] = tap["R"], tap["ulps"]
    assert {name for name in outcome.page.texts if name.startswith(("op|", "value|"))} == set(expected)
    for name, (R, ulps) in expected.items():
        assert shown(outcome.page.texts[name][0], R), name
        assert shown(outcome.page.texts[name][1], ulps), name
    assert {row["op"] for row in outcome.json["ops"]} == {
        "rope_angles",
        "ssd_scan_rope",
        "residual_rms_norm",
        "product_key_topk",
        "expert_mix",
        "rope",
        "keep_window_attention",
        "attention_rope",
        "logits",
    }


def test_the_page_shows_error_growth_after_powers_of_two(outcome: Outcome) -> None:
    rows = outcome.json["growth"]
    assert [row["runtime"] for row in rows if row["dtype"] == "float32"] == [YARDSTICK, "eager", "onnxruntime-cpu"]
    for row in rows:
        assert row["steps"] == [1, 2, 4, 8, 12]
        _, verdict, *values, R, R_limit, _ = outcome.page.texts[f"growth|{row['dtype']}|{row['runtime']}"]
        assert all(shown(text, value) for text, value in zip(values, row["rms"], strict=True))
        assert shown(R, row["R"])
        assert shown(R_limit, row["R_limit"])
        assert verdict == "passed"


def test_the_verdict_comes_first_and_is_that_of_the_exit_code(outcome: Outcome) -> None:
    assert (outcome.code, outcome.json["passed"], outcome.page.verdict) == (0, True, "PASSED"), outcome.err
    assert outcome.page.text.index("PASSED") < outcome.page.text.index("Whole models")


def test_placement_counts_every_node_of_the_session(outcome: Outcome, bundles: dict[str, Path]) -> None:
    with open_session(bundles["float32"], "onnxruntime-cpu", 1, 64) as session:
        nodes = session.placement()["CPUExecutionProvider"]
    (placed,) = (one for one in outcome.json["placements"] if (one["runtime"], one["dtype"]) == ("onnxruntime-cpu", "float32"))
    assert placed["nodes"] == len(nodes) == sum(count for kernels in placed["kernels"].values() for count in kernels.values())
    assert placed["kernels"]["ssd_scan_rope"]["LinearAttention"] == 1
    assert f"CPUExecutionProvider{len(nodes)}" in outcome.page.text.replace("\n", "")


def test_the_page_says_what_was_not_run_and_why(outcome: Outcome) -> None:
    reasons = {item["what"]: item["reason"] for item in outcome.json["not_run"]}
    assert "which ONNX Runtime's CPU kernels lack" in reasons["onnxruntime-cpu, bfloat16"]
    assert "not asked for" in reasons["compiled"]
    assert any("causal_conv1d" in what for what in reasons)
    assert all(what in outcome.page.text and reason in outcome.page.text for what, reason in reasons.items())
    assert "not run: onnxruntime-cpu, bfloat16" in outcome.err


# The file stands alone.


def test_the_page_asks_for_nothing_outside_itself(outcome: Outcome, bundles: dict[str, Path]) -> None:
    text = (bundles["bfloat16"].parent / "page.html").read_text(encoding="utf-8")
    links = [value for _, attributes in outcome.page.elements for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert not {tag for tag, _ in outcome.page.elements} & {"script", "link", "img", "iframe", "object", "base"}
    assert not any(word in text for word in ("http:", "https:", "url(", "@import"))
    assert len(text.encode()) < 1_000_000


def test_every_link_inside_the_page_has_its_place(outcome: Outcome) -> None:
    ids = [attributes["id"] for _, attributes in outcome.page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"] for tag, attributes in outcome.page.elements if tag == "a"} == {
        f"#{name}" for name in ids if name != "verdict"
    }


def test_charts_have_a_text_for_those_who_do_not_see_them(outcome: Outcome) -> None:
    charts = [attributes for tag, attributes in outcome.page.elements if attributes.get("role") == "img"]
    assert len(charts) == 3 + 3 * 9  # growth per dtype, distributions per dtype and op
    assert all(attributes["aria-label"] for attributes in charts)


@pytest.fixture(scope="module")
def report(bundles: dict[str, Path]) -> Report:
    return measure_report([open_bundle(bundles["calm"])], ["eager"], draws=2, steps=2)


def test_text_is_escaped(report: Report) -> None:
    nasty = "<script>alert('x')</script>"
    page = read(render_page(replace(report, name=nasty), nasty, nasty))
    assert page.text.count(nasty) >= 3
    assert "script" not in {tag for tag, _ in page.elements}


def test_a_value_that_is_not_a_number_fails_and_shows(report: Report) -> None:
    row = next(row for row in report.ops if row.op == "attention_rope")
    broken = replace(row, R=math.nan, taps=(replace(row.taps[0], R=math.nan),))
    changed = replace(report, ops=tuple(broken if one is row else one for one in report.ops))
    page = read(render_page(changed, "", ""))
    assert not changed.passed
    assert page.verdict == "FAILED"
    assert page.texts["op|attention_rope|float32|eager"][0] == "✗ NaN"
    assert changed.worst("eager", "float32").op == "attention_rope"
    assert json.loads(json.dumps(changed.to_dict(), allow_nan=False))["passed"] is False


def test_the_reason_why_a_runtime_is_not_here_is_on_the_page(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "its compiler <b>is</b> out of coal"
    monkeypatch.setattr("wm_runtimes.torch_runtimes.availability", lambda runtime="eager": reason if runtime == "compiled" else None)
    page = read(render_page(measure_report([open_bundle(bundles["calm"])], ["eager"], draws=1, steps=1), "", ""))
    assert reason in page.text


@given(st.floats(-1e300, 1e300))
def test_numbers_keep_three_digits(value: float) -> None:
    text = digits(value)
    assert float(text) == pytest.approx(value, rel=5e-3, abs=5e-324)
    assert len(text.lstrip("-").split("e")[0].replace(".", "").strip("0") or "0") <= 3


# What is planted wrong fails, and the op is named.


def test_a_planted_fault_fails_the_page_and_names_the_op_as_worst(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bundles["calm"], tmp_path / "wrong")
    onnx_reads_another_weight(folder, "layers.0.mixer.in_proj", one_percent_off)
    outcome = parity(tmp_path / "page.html", folder, "--runtimes", "eager,onnxruntime-cpu", "--draws", 4, "--steps", 4)
    assert outcome.code == 1
    assert outcome.err.startswith("wm: error: chooses-nothing: out of budget: onnxruntime-cpu, float32: R")
    assert outcome.page.verdict == "FAILED"
    named = "first value over its limit layers.0.ssd_scan_rope.y"
    assert named in outcome.page.text
    assert "worst op ssd_scan_rope" in outcome.page.text
    failed = {name for name, texts in outcome.page.texts.items() if any(text.startswith("✗") for text in texts)}
    assert {"model|float32|onnxruntime-cpu", "op|ssd_scan_rope|float32|onnxruntime-cpu", "growth|float32|onnxruntime-cpu"} <= failed
    assert not any(name.endswith("|eager") for name in failed)
    assert "over" in outcome.page.classes["op|ssd_scan_rope|float32|onnxruntime-cpu"].split()
    assert not outcome.page.texts["op|rope_angles|float32|onnxruntime-cpu"][0].startswith("✗")


def test_an_op_in_which_nothing_was_compared_fails(report: Report) -> None:
    row: OpRow = report.ops[0]
    assert row.passed
    assert not replace(row, values=0).passed


# The command line.


def test_bundles_that_make_no_page(bundles: dict[str, Path], tmp_path: Path) -> None:
    both = [open_bundle(bundles[name]) for name in ("float32", "calm")]
    with pytest.raises(InputError, match=r"another model than .*; a page shows one model"):
        measure_report(both, ["eager"])
    with pytest.raises(InputError, match=r"float32, as .* is; name one bundle of each dtype"):
        measure_report([both[0], both[0]], ["eager"])
    with pytest.raises(InputError, match="no runtime named"):
        measure_report(both[:1], [])
    with pytest.raises(RuntimeUnavailableError, match="bfloat16, which ONNX Runtime's CPU kernels lack"):
        measure_report([open_bundle(bundles["bfloat16"])], ["onnxruntime-cpu"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("{bundle}", "--html", "{tmp}"), "is a folder, expected a file to write"),
        (("{bundle}", "--html", "{tmp}/absent/page.html"), "its folder does not exist"),
        (("{bundle}", "{bundle}"), "2 bundles, expected one; several are compared on a page, by --html FILE"),
        (("{bundle}", "--html", "{tmp}/page.html", "--steps", "0"), "--steps"),
    ],
)
def test_wrong_command_lines_are_one_line_and_leave_no_file(
    bundles: dict[str, Path], tmp_path: Path, argv: tuple[str, ...], says: str
) -> None:
    err = io.StringIO()
    with redirect_stderr(err):
        code = run(["parity", *(part.format(bundle=bundles["calm"], tmp=tmp_path) for part in argv)])
    assert code == 2
    assert says in err.getvalue()
    assert err.getvalue().count("\n") == 1
    assert not list(tmp_path.iterdir())
