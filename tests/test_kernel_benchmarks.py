"""The cases of benchmarks/kernels.py, and its table: every bar is about something that is measured."""

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wm_kernels import triton_configs

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """Import a benchmark's module by name; they lie outside the packages."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("_kernels_report", "_timing", "_trials", "kernel_cases", "kernels", "tune")
    ]:
        sys.modules.pop(name)


def figures(us, extra=0):
    return {"us": us, "extra_bytes": extra}


def results(**case):
    measured = {"op": "a", "case": "M", "dtype": "bfloat16", "error": 0.2, "bytes": 3e8, "flops": 7e10, "bars": {}, "launches": 2}
    measured |= {
        "ours": figures(100.0, 10),
        "peers": {"p": figures(300.0, 1000), "part": figures(50.0), "gone": {"reason": "ImportError: no"}},
        "designs": {"as sweep": figures(80.0), "as fold": figures(200.0)},
    }
    machine = {"device": "X", "versions": {"torch": "2"}, "date": "D"}
    return {"machine": machine, "rates": {"copy_bytes_s": 3e12, "matmul_flop_s": 7e14}, "cases": [measured | case]}


@pytest.mark.parametrize(
    ("text", "value", "sign"),
    [
        ("× p", 3.0, "≥"),
        ("× p + part", 3.5, "≥"),
        ("× gone", None, "≥"),
        ("copy rate", 1.0, "≥"),
        ("matmul rate", 1.0, "≥"),
        ("memory ÷ p", 0.01, "≤"),
        ("time ÷ M", 1.0, "≤"),
        ("time ÷ N", None, "≤"),
        ("× the fastest of our designs", 0.8, "≥"),
        ("launches", 2, "≤"),
    ],
)
def test_a_bar_is_what_its_text_says(modules, text, value, sign):
    found = results()
    measured = modules("_kernels_report").bar(found, found["cases"][0], text)
    assert measured == (pytest.approx(value) if value is not None else None, sign)


@pytest.mark.parametrize(
    ("text", "value", "by"),
    [
        ("copy rate", 4.0, "graph"),
        ("time ÷ N", 0.5, "graph"),
        ("time ÷ O", 0.125, "graph ÷ Python"),
        ("× the fastest of our designs", 1.2, "graph"),
        ("× p", 3.0, "Python"),
        ("launches", 2, "–"),
    ],
)
def test_what_the_device_does_is_judged_by_its_own_time_and_peers_by_that_from_python(modules, text, value, by):
    report, found = modules("_kernels_report"), results(ours=figures(100.0, 10) | {"graph_us": 25.0})
    case = found["cases"][0]
    case["designs"] = {"as sweep": figures(110.0) | {"graph_us": 30.0}}
    found["cases"] += [case | {"case": "N", "ours": figures(400.0) | {"graph_us": 50.0}}, case | {"case": "O", "ours": figures(200.0)}]
    assert report.bar(found, case, text)[0] == pytest.approx(value)
    assert report.clock(found, case, text) == by
    assert "12.00 TB/s (400%)" in report.line(case, found["rates"])


def test_our_designs_have_a_table_of_their_own(modules):
    text = modules("_kernels_report").render(results())
    assert "| op, case, dtype | ours: µs | as fold (÷ ours) | as sweep (÷ ours) |" in text
    assert "| a, M, bfloat16 | 100.0 | 200.0 (2.00) | 80.0 (0.80) |" in text


def test_the_report_says_what_failed_and_what_could_not_run(modules, tmp_path):
    report = modules("_kernels_report")
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nBefore.\n", encoding="utf-8")
    report.write(results(bars={"× p": 4.0, "launches": 2}), tmp_path)
    first = document.read_text(encoding="utf-8")
    assert first.startswith("# Performance\n\nBefore.\n")
    assert "| a, M: × p | 3 | Python | ≥ 4 | **no** |" in first
    assert "| a, M: launches | 2 | – | ≤ 2 | yes |" in first
    assert "* gone (a): ImportError: no" in first
    assert "3.00</text>" in (tmp_path / "kernels.svg").read_text(encoding="utf-8")
    # A wrong result has no times, and what was written before is replaced.
    wrong = results(error=float("inf"), reason="OutOfResources: shared memory")
    for name in ("ours", "peers", "designs", "launches"):
        wrong["cases"][0].pop(name)
    report.write(wrong, tmp_path)
    second = document.read_text(encoding="utf-8")
    assert "| a, M, bfloat16 | wrong |" in second
    assert "gone" not in second
    assert second.count(report.BEGIN) == 1
    assert "OutOfResources" in report.line(wrong["cases"][0], wrong["rates"])


HANGS = """
import faulthandler, threading, time
threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
def build_a_mask():
    faulthandler.dump_traceback_later(0.2, exit=True)
    time.sleep(20)
build_a_mask()
"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (HANGS, "no answer within 7 s in a process of its own; it was in build_a_mask (<string>:6), called by <module> (<string>:7)"),
        ("raise ImportError('no such peer')", "ImportError: no such peer"),
        ("import os; os._exit(3)", "the process ended without a word"),
    ],
)
def test_a_trial_says_why_its_process_ended(modules, program, reason):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert modules("_trials").why(done.stderr, 7.0) == reason


def test_peers_after_one_that_ends_its_process_are_tried_in_another(modules, monkeypatch):
    trials, started = modules("_trials"), []

    def run(command, **_):
        peers = command[command.index("7.0") + 1 :]
        started.append(peers)
        called = itertools.takewhile(lambda peer: peer != "bad", peers)
        lines = [json.dumps({"op": "a", "case": "M", "peer": peer, "seconds": 1.0}) for peer in called]
        return subprocess.CompletedProcess(command, int("bad" in peers), "\n".join(lines))

    monkeypatch.setattr(trials.subprocess, "run", run)
    outcomes = trials.apart("a", "M", ["good", "bad", "last"], 7.0)
    assert [(found["peer"], "reason" in found) for found in outcomes] == [("good", False), ("bad", True), ("last", False)]
    assert started == [["good", "bad", "last"], ["last"]]


def test_runs_of_some_cases_are_joined_and_compared_within_themselves(modules, tmp_path):
    report = modules("_kernels_report")
    bars = {"× p": 1.0, "time ÷ M": 2.0}
    first, second = results(bars=bars), results(bars=bars, ours=figures(50.0), peers={"p": figures(400.0)})
    second["cases"].append(second["cases"][0] | {"case": "N", "ours": figures(90.0), "peers": {}})
    second["rates"] = {"copy_bytes_s": 6e12, "matmul_flop_s": 7e14}
    joined = report.join([first, second])
    rows = {row["case"]: row for row in joined["cases"]}
    assert (rows["M"]["run"], rows["N"]["run"]) == (1, 2)  # the first M has two peers, the second one
    assert report.bar(joined, rows["M"], "× p") == (3.0, "≥")
    assert report.bar(joined, rows["N"], "time ÷ M") == (pytest.approx(1.8), "≤")  # the M of its own run
    assert report.join(report.split(joined))["cases"] == joined["cases"]  # which the row keeps
    text = report.render(joined)
    assert "| a, N, bfloat16 (run 2) | 90.0 |" in text
    assert "3.33 TB/s (56%)" in text
    assert "1. D: X, torch 2. A copy moves 3.00 TB/s" in text


class Endless:
    """As flex_attention's BlockMask: every index has an answer, so that a loop over it has no end."""

    def __getitem__(self, index):
        return self


@pytest.mark.parametrize("made", [Endless(), None, 1.0, torch.zeros(2), (torch.zeros(2), None)])
def test_extra_memory_takes_whatever_a_peer_returns(modules, monkeypatch, made):
    kernels = modules("kernels")
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 170), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(kernels.torch.cuda, name, lambda value=value: value)
    assert kernels.extra_memory(lambda: made) == 70


WAITS_IN_C = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import kernels

def wait_for_the_device():
    ctypes.CDLL(None).sleep(60)

with kernels.at_most(0.2):
    wait_for_the_device()
"""


def test_a_call_that_waits_in_c_code_for_ever_ends_its_process(modules):
    command = [sys.executable, "-c", WAITS_IN_C, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "it was in wait_for_the_device" in modules("_trials").why(done.stderr, 0.2)


# Stands for the process that measures: the peer "bad" of case M ends it, as does case N itself.
MEASURES = """
import json, sys
asked = json.load(sys.stdin)
say = lambda **what: print(json.dumps({"said": what}), flush=True)
say(run={"rates": {"started": len(asked["reasons"])}})
print("a compiler's talk")
for op, case in asked["cases"]:
    say(at=[op, case, None])
    if case == "N":
        sys.exit("our kernel hangs")
    reasons = {peer: reason for *_, peer, reason in asked["reasons"]}
    for peer in ("good", "bad"):
        if peer not in reasons:
            say(at=[op, case, peer])
            if (case, peer) == ("M", "bad"):
                sys.exit("the peer hangs")
    say(found={"op": op, "case": case, "error": 0.1, "peers": reasons})
"""


def test_designs_are_timed_as_ours_is_once_all_are_right(modules, monkeypatch):
    kernels, Case = modules("kernels"), modules("kernel_cases").Case
    times = {"ours": 100.0, "as fold": 900.0}
    monkeypatch.setattr(kernels, "timed", lambda call: figures(times[call()]))
    monkeypatch.setattr(kernels, "graph_microseconds", lambda call: times[call()] / 2)
    monkeypatch.setattr(kernels, "launches", lambda call: 2)
    case = Case("a", "M", "bfloat16", dict, lambda v: "ours", lambda v: v["error"], designs={"as fold": lambda v: "as fold"})
    found = kernels.ours(case, {"error": 0.5})
    assert found["ours"] == figures(100.0) | {"graph_us": 50.0}
    assert found["designs"] == {"as fold": figures(900.0)}  # too long for the host to show
    assert "designs" not in kernels.ours(case, {"error": 2.0})


def test_what_ends_the_measuring_process_is_named_and_another_goes_on(modules):
    kernels, Case = modules("kernels"), modules("kernel_cases").Case
    cases = [Case("a", name, "bfloat16", dict, dict, dict) for name in ("L", "M", "N", "O")]
    runs = list(kernels.gather(cases, [], [], 7.0, [sys.executable, "-c", MEASURES]))[-1]
    assert [[found["case"] for found in run["cases"]] for run in runs] == [["L"], ["M", "N"], ["O"]]
    assert runs[1]["cases"][0]["peers"] == {"bad": "the peer hangs"}
    assert (runs[1]["cases"][1]["error"], runs[1]["cases"][1]["reason"]) == (float("inf"), "our kernel hangs")


def test_a_measuring_process_that_cannot_start_says_why(modules):
    kernels, Case = modules("kernels"), modules("kernel_cases").Case
    command = [sys.executable, "-c", "raise ImportError('no torch')"]
    with pytest.raises(SystemExit, match="did not start: ImportError: no torch"):
        list(kernels.gather([Case("a", "M", "bfloat16", dict, dict, dict)], [], [], 7.0, command))


def test_joined_runs_are_split_as_they_were(modules):
    report = modules("_kernels_report")
    first, second = results(), results()
    second["cases"][0]["case"] = "N"
    again = report.split(report.join([first, second]))
    assert [[found["case"] for found in run["cases"]] for run in again] == [["M"], ["N"]]
    assert report.join(again)["cases"] == report.join([first, second])["cases"]
    assert report.split(first) == [first]


def test_the_page_is_written_from_its_record(modules):
    report = modules("_kernels_report")
    found = json.loads((BENCHMARKS / "results" / "kernels.json").read_text(encoding="utf-8"))
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"{report.BEGIN}\n\n{report.render(found)}\n\n{report.END}" in page
    assert (BENCHMARKS.parent / "docs" / "kernels.svg").read_text(encoding="utf-8") == report.plot(found)


def test_every_bar_of_a_case_names_something_measured(modules):
    report, cases = modules("_kernels_report"), modules("kernel_cases").all_cases()
    assert len({(case.op, case.name, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        peers = {name: figures(1.0, 1) for name in case.peers}
        found = results(op=case.op, case=case.name, dtype=case.dtype, bytes=case.bytes, flops=case.flops, peers=peers, bars=dict(case.bars))
        found["cases"][0]["designs"] = {name: figures(1.0) for name in case.designs}
        for text, limit in case.bars.items():
            value, _ = report.bar(found, found["cases"][0], text)
            beside = text.removeprefix("time ÷ ")
            others = {other.name for other in cases if other.op == case.op} if text != beside else set()
            assert value is not None or beside in others, f"{case.op} {case.name}: {text} names nothing that is measured"
            assert limit > 0


def test_spaces_start_from_all_values_and_try_only_those(modules):
    from importlib.resources import files

    for space in modules("kernel_cases").all_spaces():
        names = {name for group in space.groups for values in group for name in values}
        assert names <= set(space.start)
        table = json.loads(files("wm_kernels").joinpath(space.case.op, "triton_configs.json").read_text(encoding="utf-8"))
        served = [set(row["values"]) for row in table if row.get("regime", space.regime) == space.regime]
        assert served, (space.case.op, space.regime)
        assert all(values <= set(space.start) for values in served), (space.case.op, space.regime)


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """A copy of the tables in place of the package's."""
    source = Path(triton_configs.__file__).parent
    for table in source.glob("*/triton_configs.json"):
        (tmp_path / table.parent.name).mkdir()
        shutil.copy(table, tmp_path / table.parent.name)
    monkeypatch.setattr(triton_configs, "files", lambda package: tmp_path)
    yield tmp_path
    triton_configs._rows.cache_clear()
    triton_configs.config.cache_clear()


def read(*key):
    triton_configs._rows.cache_clear()
    triton_configs.config.cache_clear()
    return dict(triton_configs.config(*key))


def test_the_table_that_the_tuner_writes_is_the_table_that_is_read(modules, tables, monkeypatch):
    tune = modules("tune")
    assert Path(triton_configs.__file__).parent == tune.KERNELS  # where it writes when it is not tested
    monkeypatch.setattr(tune, "KERNELS", tables)
    spaces = [space for space in modules("kernel_cases").all_spaces() if space.case.op == "router_topk"]
    general, of_1024 = (next(space for space in spaces if bool(space.dims) == named) for named in (False, True))
    elsewhere = read("router_topk", "sm_80", "bfloat16", "narrow", (("E", 64), ("k", 8)))
    for warps in (16, 32):  # a second row for the same takes the place of the first
        tune.write(of_1024, {"elements": 1, "num_warps": warps}, "sm_90")
        tune.write(general, {"elements": 2, "num_warps": warps}, "sm_90")
        assert read("router_topk", "sm_90", "bfloat16", "narrow", (("E", 64), ("k", 8))) == {"elements": 2, "num_warps": warps}
        assert read("router_topk", "sm_90", "bfloat16", "narrow", (("E", 1024), ("k", 8))) == {"elements": 1, "num_warps": warps}
    assert read("router_topk", "sm_80", "bfloat16", "narrow", (("E", 64), ("k", 8))) == elsewhere


def test_the_tuner_compiles_what_a_launch_would(modules, monkeypatch):
    pytest.importorskip("triton")
    from wm_kernels.router_topk import triton_op

    tune, cases, plan = modules("tune"), modules("kernel_cases"), triton_op.plan

    def limited(*arguments):
        made = plan(*arguments)
        return replace(made, launches=tuple(replace(launch, max_registers=64, num_stages=3) for launch in made.launches))

    monkeypatch.setattr(triton_op, "plan", limited)
    logits = torch.randn(4, 8)
    case = cases.Case(
        "router_topk", "small", "float32", dict, lambda inputs: triton_op.router_topk_triton(logits, 2, True), lambda inputs: 0.0
    )
    try:
        (job,) = tune.compilations(cases.Space(case, "few", {}, {}, []), {"elements": 16, "num_warps": 2}, {})
    finally:
        tune.force("router_topk")
    module, kernel, arguments, options = job
    assert (module, kernel) == ("wm_kernels.router_topk.triton_kernel", "router_topk_kernel")
    assert arguments == (torch.float32, torch.float32, torch.int64, 4, 8)
    assert (options["BLOCK_M"], options["BLOCK_E"]) == (2, 8)
    assert (options["num_warps"], options["num_stages"], options["maxnreg"]) == (2, 3, 64)
