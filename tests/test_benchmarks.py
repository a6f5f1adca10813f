"""The benchmarks' tables say what was measured and what was not."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MACHINE = {
    "cpu": "C",
    "cores": 2,
    "memory_gb": 8,
    "system": "S",
    "python": "3",
    "load_at_start": 0.0,
    "date": "D",
    "versions": {"torch": "2"},
}
PROTOCOL = {"repeats": 1, "prompt": 512, "steps": 128, "threads": 2}


@pytest.fixture
def modules(monkeypatch):
    """Import a benchmark's module by name; they lie outside the packages."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in ("_report", "_peers", "_processes", "cpu"):
        sys.modules.pop(name, None)


def _results(decode, peer):
    ours = {"prefill_tok_s": 1100.0, "decode_tok_s": decode, "cold_s": 1.3, "rss_mb": 700.0, "cold_rss_mb": 801.0, "tokens": [5, 6, 8]}
    reference = {"prefill_tok_s": 1000.0, "decode_tok_s": 20.0, "tokens": [5, 6, 7]}
    tools = {"wm-graph": ours, "onnxruntime-genai": peer, "transformers eager": reference}
    return {"machine": MACHINE, "protocol": PROTOCOL, "smollm2": {"tools": tools}}


def test_bars_are_judged(modules):
    text = modules("_report").render(_results(50.0, {"prefill_tok_s": 600.0, "decode_tok_s": 40.0, "tokens": [5, 6, 7]}))
    assert "| SmolLM2 decode ÷ onnxruntime-genai | 1.25 | ≥ 1 | yes |" in text
    assert "| SmolLM2 prefill ÷ best of transformers and mobius | 1.10 | ≥ 1.1 | yes |" in text
    assert "start to first token, s | 1.30 | ≤ 1.3 | yes |" in text
    assert "| SmolLM2 peak memory, MB | 801 | ≤ 800 | **no** |" in text
    assert "2 of 3 |" in text


def test_what_was_not_run_says_why(modules):
    text = modules("_report").render(_results(50.0, {"not_run": "no such package"}))
    assert "| SmolLM2 decode ÷ onnxruntime-genai | not run | ≥ 1 | not run |" in text
    assert "| onnxruntime-genai |  | not run (no such package) |" in text
    assert "### cheems-20m, float32\n\nnot run (left out)" in text


def test_report_replaces_only_its_part(modules, tmp_path):
    report = modules("_report")
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_report(_results(50.0, {"not_run": "x"}), document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert text.count("### Bars") == 1


def test_peer_that_cannot_be_set_up_is_named(modules, tmp_path, monkeypatch):
    peers = modules("_peers")
    monkeypatch.setattr(peers, "call", lambda command, what: (_ for _ in ()).throw(peers.NotRun(f"{what}: no network")))
    found = modules("cpu").guarded(lambda: {"python": peers.environment(tmp_path, "genai")})
    assert found == {"not_run": "genai: venv: no network"}
    assert not (tmp_path / "genai" / ".ready").exists()


def test_process_is_measured_and_its_failure_explained(modules):
    processes, peers = modules("_processes"), modules("_peers")
    finished = processes.run_process([sys.executable, "-c", "print('a'); print('b')"])
    assert finished.stdout == "a\nb\n"
    assert 0 < finished.first_output_s <= finished.seconds
    assert finished.rss_mb > 1
    with pytest.raises(peers.NotRun, match=r"^out of luck$"):
        processes.run_process([sys.executable, "-c", "import sys; sys.exit('out of luck')"])


def test_results_of_another_protocol_are_not_kept(modules):
    cpu = modules("cpu")
    old = {**_results(1.0, {}), "export": {"seconds": 1.0}}
    new = {"machine": {**MACHINE, "date": "later"}, "protocol": PROTOCOL}
    assert cpu.merge(old, new)["export"] == {"seconds": 1.0}
    assert cpu.merge(old, {**new, "protocol": {**PROTOCOL, "repeats": 9}}) == {**new, "protocol": {**PROTOCOL, "repeats": 9}}


def test_command_explains_itself():
    shown = subprocess.run([sys.executable, BENCHMARKS / "cpu.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--peers-dir" in shown
    assert "--parts" in shown
