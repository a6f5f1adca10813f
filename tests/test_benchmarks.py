"""The benchmarks' tables say what was measured and what was not."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from wm_graph.tolerances import model_limit
from wm_runtimes.draws import make_draws
from wm_runtimes.labels import runtime_of

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
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    yield importlib.import_module
    for name in ("_report", "_cuda_report", "_peers", "_processes", "cpu", "protocol", "presets"):
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


def test_mamba2_is_judged_by_mobius(modules):
    ours = {"version": "1", "prefill_tok_s": 1290.0, "decode_tok_s": 50.0, "logit_difference": 0.00064, "largest_logit": 13.0}
    peer = {**ours, "prefill_tok_s": 1000.0}
    results = {"machine": MACHINE, "protocol": PROTOCOL, "mamba2": {"tools": {"wm-graph": ours, "mobius, onnxruntime": peer}}}
    text = modules("_report").render(results)
    assert "| Mamba2-115M decode ÷ mobius | 1.00 | ≥ 1 | yes |" in text
    assert "| Mamba2-115M prefill ÷ mobius | 1.29 | ≥ 1.3 | **no** |" in text
    assert "| wm-graph | 1 | 1290 | 50.0 | not run | 0.00064 of 13.0 |" in text
    results["mamba2"]["tools"]["mobius, onnxruntime"] = {"version": "2", "not_run": "mobius build: a | b"}
    text = modules("_report").render(results)
    assert "| Mamba2-115M decode ÷ mobius | not run | ≥ 1 | not run |" in text
    assert "| mobius, onnxruntime | 2 | not run (mobius build: a / b) |" in text


def test_decode_is_judged_by_what_memory_allows(modules):
    tools = {"onnxruntime-cpu": {"decode_tok_s": 15.0}, "eager": {"decode_tok_s": 16.0}}
    part = {"memory": {"read_gb_s": 24.0}, "step_mb": 1200.0, "tools": tools}
    text = modules("_report").render({"machine": MACHINE, "protocol": PROTOCOL, "cheems-320m": part})
    assert "| cheems-320m decode ÷ eager | 0.94 | ≥ 0.95 | **no** |" in text
    assert "| cheems-320m decode, share of what memory allows, % | 75.0 | ≥ 70 | yes |" in text
    assert "at most 20.0 steps a second" in text
    part["memory"] = {"not_run": "no numpy"}
    text = modules("_report").render({"machine": MACHINE, "protocol": PROTOCOL, "cheems-320m": part})
    assert "| cheems-320m decode, share of what memory allows, % | not run | ≥ 70 | not run |" in text


@pytest.mark.parametrize(("tied", "expected"), [(True, 4 * (10 * 3 + 7)), (False, 4 * (3 + 10 * 3 + 7))])
def test_a_step_reads_one_row_of_an_embedding_that_is_not_the_head(modules, tmp_path, tied, expected):
    from safetensors.numpy import save_file

    tensors = {"embedding": np.zeros((10, 3), np.float32), "norm": np.zeros(7, np.float32)}
    if not tied:
        tensors["head"] = np.zeros((10, 3), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert modules("cpu").bytes_per_step(tmp_path / "model.safetensors") == expected


def test_memory_is_read_at_some_rate(modules):
    script = [sys.executable, BENCHMARKS / "_read_rate.py", "--megabytes", 8, "--tries", 1]
    assert 0.1 < modules("_processes").run_json(script)["read_gb_s"] < 10_000


def test_logits_are_checked_after_the_prompt_and_every_token(modules, tmp_path):
    rows = {1: [1.0, -4.0], 2: [0.0, 0.5], 3: [2.0, 2.0]}
    file = tmp_path / "reference.json"
    file.write_text(json.dumps({"ids": [5, 1], "tokens": [2, 3], "logits": list(rows.values())}))

    def check(found):
        runner = SimpleNamespace(logits=None)

        def step(token):
            runner.logits = np.array(found[token])

        runner.step, runner.prefill = step, lambda ids: step(ids[-1])
        return modules("protocol").check(runner, file)

    assert check(rows) == {"logit_difference": 0, "largest_logit": 4}
    assert check({**rows, 3: [2.0, 2.25]})["logit_difference"] == 0.25
    assert check({**rows, 1: [1.0, -3.0]})["logit_difference"] == 1
    assert check({**rows, 2: [float("nan"), 0.5]})["logit_difference"] == float("inf")


def test_model_is_made_anew_when_its_script_changes(modules, tmp_path, monkeypatch):
    peers, made = modules("_peers"), []

    def make(cache, folder, source):
        folder.mkdir()
        made.append(source.read_text())

    monkeypatch.setitem(peers._MAKERS, "x", make)
    script = tmp_path / "make.py"
    for text in ("seed = 0", "seed = 0", "seed = 1"):
        script.write_text(text)
        peers.model(tmp_path / "cache", "x", script)
    assert made == ["seed = 0", "seed = 1"]


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


def test_parity_of_presets_is_written_from_its_record_and_tells_every_pair(modules):
    presets = modules("presets")
    found = json.loads((BENCHMARKS / "results" / "presets.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "parity.md").read_text()
    assert page == presets.render(found, presets.on_gpu())
    on_cpus = page.partition("## On a GPU")[0]
    lines = [line.strip("| ").split(" | ") for line in on_cpus.splitlines() if line.startswith("| `")]
    pairs = {(f"`{name}`", dtype) for name in presets.PRESETS for dtype in presets.DTYPES.values()}
    assert {(name, dtype) for name, dtype, *_ in lines} == pairs
    assert all(verdict == "passed" or verdict.startswith("not measured: ") for *_, verdict in lines)


def test_parity_of_presets_tells_how_much_was_compared_when_and_by_what(modules, monkeypatch, tmp_path):
    presets = modules("presets")
    page = (BENCHMARKS.parent / "docs" / "parity.md").read_text()
    assert "Of a bundle parity asks 64 draws; here presets of 320 M parameters are measured with 8 and those of 1.3 G with\n4," in page
    assert "`compiled` with at most 16." in page
    found = json.loads((BENCHMARKS / "results" / "presets.json").read_text())
    for key, entry in found.items():
        preset = presets.PRESETS[key.split()[0]]
        size = presets.count_parameters(preset)
        assert len(make_draws(preset.vocab_size, entry["draws"], presets.SEED, 79, 8, 271)) == (8 if size < 2e8 else 1)  # 1: not in pieces
        assert entry["draws"] == (64 if size < 2e8 else 8 if size < 1e9 else 4)
        assert f"{entry['draws']} draws are {entry['tokens']}" in page
        assert {row.get("draws", entry["draws"]) for row in entry["rows"] if row["runtime"] == "compiled"} <= {min(entry["draws"], 16)}
    bare = sum("date" not in entry for entry in found.values())
    assert (f"Of {bare} of {len(found)} entries the record does not say when" in page) == bool(bare)

    report = {"bundle": "b", "draws": 64, "tokens": 9, "rows": []}
    asked = []

    def wm(*words, **options):
        asked.append(words)
        if words[0] == "init":
            words[-1].mkdir()
        return json.dumps(report)

    monkeypatch.setattr(presets, "wm", wm)
    monkeypatch.setattr(presets, "enliven", lambda checkpoint: None)
    entry = presets.measure("cheems-tiny", "fp32", tmp_path / "work")
    assert entry["seed"] == presets.SEED
    assert all(words[words.index("--seed") + 1] == entry["seed"] for words in asked if words[0] == "parity")
    assert entry["versions"].keys() == {"torch", "onnxruntime", "python"}
    text = presets.render({"cheems-tiny fp32": entry}, {})
    assert f"Measured on {entry['date']} from seed 0: torch {entry['versions']['torch']}, onnxruntime " in text
    assert "the record does not say" not in text


def test_bars_of_a_gpu_are_judged_and_what_was_not_measured_is_none(modules):
    ours = {"prefill_s": 0.02, "step_s": 6e-4, "graph_s": 5e-4, "weights_bytes": 6e8, "opened_bytes": 9e8}
    rows = {
        "onnxruntime-cuda:kernels": {"1": ours},
        "compiled": {"1": {"prefill_s": 0.01, "graph_s": 6e-4}},
        "references": {"reason": "none"},
    }
    model = {"preset": "toy", "dtype": "bf16", "bounds": {"1": {"weight_bytes": 6e8, "state_bytes": 0}}, "rows": rows}
    machine = {"date": "2026-11-01", "device": "a GPU", "versions": {"torch": "2"}}
    text = modules("_cuda_report").render({"machine": machine, "rates": {"copy_bytes_s": 3e12}, "models": [model]})
    assert "| toy: prompt on kernels × compiled | 0.5 | ≥ 0.9 | **no** |" in text
    assert "| toy: step on kernels × compiled | 1.2 | ≥ 1 | yes |" in text
    assert "| toy: step on kernels, share of its bound | 0.4 | ≥ 0.45 | **no** |" in text
    assert "| toy: prompt on bodies × eager references | not measured | ≥ 0.5 | – |" in text
    assert "* references: none" in text


def test_tables_of_a_gpu_are_written_from_their_record(modules):
    report = modules("_cuda_report")
    found = json.loads((BENCHMARKS / "results" / "cuda_runtimes.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert f"{report.BEGIN}\n\n{report.render(found)}\n\n{report.END}" in page


def test_what_is_recorded_of_presets_is_within_the_limits_of_today():
    found = json.loads((BENCHMARKS / "results" / "presets.json").read_text())
    rows = [row for measured in found.values() for row in measured["rows"] if "error" not in row]
    for row in rows:
        limit = model_limit(row["dtype"], runtime_of(row["runtime"]))
        assert row["R"] <= limit.R == row["R_limit"]
        assert row["max_abs"] <= row["max_abs_limit"]
        assert row["choice_rate"] <= limit.choice_rate == row["choice_rate_limit"]
        assert row["choice_excess"] <= 1.0
    assert len(rows) > 100


def test_command_explains_itself():
    shown = subprocess.run([sys.executable, BENCHMARKS / "cpu.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--peers-dir" in shown
    assert "--parts" in shown
