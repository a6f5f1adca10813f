"""What `wm` does when all is well, on cheems-tiny."""

import json
import shutil
import subprocess
import sys

import pytest

from cli_support import make_bundle, wm
from wm_graph.cli.app import COMMANDS
from wm_graph.cli.demo_command import make_room
from wm_graph.errors import CheckpointError
from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters
from wm_runtimes import open_session

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich", "tokenizers", "safetensors", "wm_kernels")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def bundle(made):
    return made[1]


def loaded_by(*argv):
    """Which heavy modules a process has loaded after `wm argv...`."""
    script = (
        "import sys; from wm_graph.cli import run; code = run(sys.argv[1:]); "
        f"print(code, *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script, *map(str, argv)], capture_output=True, text=True, check=True)
    code, *names = result.stderr.split()
    assert code == "0", result.stderr
    return set(names)


def test_help_lists_every_command_with_a_whole_line(capfd):
    result = wm(capfd, "--help")
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("  ") and line.split()}
    for name in COMMANDS:
        assert lines[name].endswith("."), lines[name]
        assert not lines[name].endswith("..."), lines[name]


def test_no_arguments_show_the_help(capfd):
    assert wm(capfd) == wm(capfd, "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capfd, name):
    result = wm(capfd, name, "--help")
    assert result.code == 0
    assert result.out.startswith(f"Usage: wm {name}")


@pytest.mark.parametrize("argv", [("--help",), ("presets",), ("info", "cheems-20m")])
def test_light_commands_load_nothing_heavy(argv):
    assert not loaded_by(*argv)


def test_generate_in_onnxruntime_loads_neither_torch_nor_onnx_nor_rich(bundle):
    loaded = loaded_by("generate", bundle, "--prompt", "hi", "--max-tokens", 2)
    assert "onnxruntime" in loaded
    assert not loaded & {"torch", "onnx", "rich", "wm_kernels", "safetensors"}


def test_presets(capfd):
    found = wm(capfd, "presets", "--json").json
    assert [entry["name"] for entry in found] == list(PRESETS)
    millions = {entry["name"]: round(entry["parameters"] / 1e6, 1) for entry in found}
    assert (millions["cheems-320m"], millions["cheems-320m-moe"], millions["cheems-1.3b"]) == (335.7, 487.8, 1208.6)
    text = wm(capfd, "presets").out
    assert all(name in text for name in PRESETS)


def test_init_and_info(capfd, tmp_path):
    result = wm(capfd, "init", "cheems-tiny-moe", "-o", tmp_path / "new", "--seed", 3, "--dtype", "bf16", "--json")
    assert result.code == 0
    assert result.json["parameters"] == count_parameters(PRESETS["cheems-tiny-moe"])
    facts = wm(capfd, "info", tmp_path / "new", "--json").json
    assert (facts["kind"], facts["dtype"], facts["parameters"]) == ("checkpoint", "bfloat16", result.json["parameters"])
    assert set(facts["files"]) == {"config.json", "generation.json", "model.safetensors", "tokenizer.json"}


def test_the_seed_alone_decides_the_parameters(capfd, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert wm(capfd, "init", "cheems-tiny", "-o", tmp_path / name, "--seed", seed).code == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_info_agrees_about_preset_checkpoint_and_bundle(capfd, made):
    facts = [wm(capfd, "info", path, "--capacity", 100, "--json").json for path in ("cheems-tiny", *made)]
    assert [fact["kind"] for fact in facts] == ["preset", "checkpoint", "bundle"]
    for key in ("config", "parameters", "dtype", "capacity", "state_bytes_per_row"):
        assert facts[0][key] == facts[1][key] == facts[2][key]


def test_info_counts_the_state_of_a_session(capfd, bundle):
    facts = wm(capfd, "info", bundle, "--capacity", 64, "--json").json
    with open_session(bundle, capacity=64) as session:
        held = sum(array.nbytes for array in session.snapshot().leaves.values())
    assert facts["state_bytes_per_row"] == held + 8  # and the position


def test_check_passes(capfd, bundle):
    result = wm(capfd, "check", bundle, "--runtimes", "eager,onnxruntime-cpu", "--json")
    assert result.code == 0
    assert result.json["passed"]


@pytest.mark.parametrize("prompt", ["The capital of France is", "é", "x" * 100])
def test_eager_and_onnxruntime_give_the_same_text(capfd, bundle, prompt):
    eager, ort = (
        wm(capfd, "generate", bundle, "--prompt", prompt, "--runtime", runtime, "--max-tokens", 12, "--json")
        for runtime in ("eager", "onnxruntime-cpu")
    )
    assert eager == ort
    assert len(eager.json["tokens"]) == 12
    assert wm(capfd, "generate", bundle, "--prompt", prompt, "--max-tokens", 12).out == eager.json["text"] + "\n"


def test_prompts_of_a_batch_are_independent(capfd, bundle, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file")
    argv = (
        "--prompt",
        "one",
        "--prompt",
        "another one",
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--prompt-ids",
        "1,80",
        "--max-tokens",
        6,
    )
    lines = [json.loads(line) for line in wm(capfd, "generate", bundle, *argv, "--json").out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "another one", "from a file", None]
    for line in lines:
        ids = ",".join(map(str, line["prompt_ids"]))
        alone = wm(capfd, "generate", bundle, "--prompt-ids", ids, "--max-tokens", 6, "--json").json
        assert alone["tokens"] == line["tokens"]
    headings = [line for line in wm(capfd, "generate", bundle, *argv).out.splitlines() if line.startswith("===")]
    assert headings == ["=== 1: one", "=== 2: another one", "=== 3: from a file", "=== 4: 1,80"]


def test_a_seed_repeats_sampling(capfd, bundle):
    argv = ("generate", bundle, "--prompt", "a", "--max-tokens", 20, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--json", "--seed")
    assert wm(capfd, *argv, 5).json == wm(capfd, *argv, 5).json
    assert wm(capfd, *argv, 5).json != wm(capfd, *argv, 6).json


def test_stop_ids_and_stop_texts_end_a_row(capfd, bundle):
    full = wm(capfd, "generate", bundle, "--prompt", "hello", "--max-tokens", 10, "--json").json
    assert full["ended"] == "length"
    stopped = wm(capfd, "generate", bundle, "--prompt", "hello", "--stop-id", full["tokens"][0], "--json").json
    assert (stopped["tokens"], stopped["ended"]) == ([], "stop id")
    cut = wm(capfd, "generate", bundle, "--prompt", "hello", "--stop", full["text"][0], "--json").json
    assert (cut["text"], cut["ended"]) == ("", "stop text")


def test_stats_go_to_stderr(capfd, bundle):
    result = wm(capfd, "generate", bundle, "--prompt", "a", "--max-tokens", 3, "--stats")
    assert "tok/s" in result.err
    assert "tok/s" not in result.out


def test_chat_uses_the_template(capfd, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "chat")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["chat_template"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = wm(capfd, "generate", copy, "--chat", "--system", "Be brief.", "--prompt", "Hi", "--max-tokens", 1, "--json").json
    assert bytes(token - 3 for token in result["prompt_ids"] if token >= 3) == b"[system] Be brief.\n[user] Hi\n"


def test_parity_passes(capfd, bundle):
    result = wm(capfd, "parity", bundle, "--runtimes", "eager,onnxruntime-cpu", "--draws", 4, "--json")
    assert result.code == 0
    assert [row["runtime"] for row in result.json["rows"]] == ["eager", "onnxruntime-cpu"]


def test_bench_measures(capfd, bundle):
    argv = ("--runtimes", "onnxruntime-cpu", "--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 1, "--json")
    (row,) = wm(capfd, "bench", bundle, *argv).json["results"]
    assert row.pop("runtime") == "onnxruntime-cpu"
    assert all(value > 0 for value in row.values())


def test_doctor_knows_every_runtime(capfd):
    found = wm(capfd, "doctor", "--json").json
    assert {"eager", "compiled", "onnxruntime-cpu", "onnxruntime-cuda", "native kernels"} == set(found["runtimes"])
    assert found["versions"]["torch"]
    assert found["cores"] >= 1


def test_import_export_generate(capfd, tmp_path):
    """A Llama GGUF with a tokenizer, all the way to text."""
    pytest.importorskip("transformers")
    from import_sources import byte_vocabulary, make_llama, write_gguf

    write_gguf(tmp_path / "model.gguf", make_llama(vocab_size=300), vocabulary=byte_vocabulary("gpt-2"))
    result = wm(capfd, "import", tmp_path / "model.gguf", "-o", tmp_path / "checkpoint", "--json")
    assert result.code == 0, result.err
    assert result.json["tokenizer"]
    assert wm(capfd, "export", tmp_path / "checkpoint", "-o", tmp_path / "bundle").code == 0
    eager, ort = (
        wm(capfd, "generate", tmp_path / "bundle", "--prompt", "hi", "--runtime", runtime, "--max-tokens", 5, "--json")
        for runtime in ("eager", "onnxruntime-cpu")
    )
    assert eager.code == 0, eager.err
    assert eager == ort


def test_export_into_makes_the_same_files_again(capfd, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    before = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(b"")
    assert wm(capfd, "export", "--into", copy, "--targets", "onnx").code == 0
    assert (copy / "model.onnx").read_bytes() == before


def test_a_second_demo_replaces_only_what_the_first_made(made, tmp_path, capsys):
    output = tmp_path / "wm-demo"
    make_room(output)
    shutil.copytree(made[0], output / "checkpoint")
    with pytest.raises(CheckpointError, match="did not make"):
        make_room(output)
    config = output / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace("cheems-tiny", "cheems-demo"))
    make_room(output)
    assert not list(output.iterdir())
    assert "Replacing" in capsys.readouterr().out


def test_parity_takes_a_graph_of_the_bundle_as_a_runtime(bundle, capfd):
    outcome = wm(capfd, "parity", bundle, "--runtimes", "eager,onnxruntime-cpu:model.onnx", "--draws", 2, "--json")
    assert outcome.code == 0, outcome.err
    assert [row["runtime"] for row in outcome.json["rows"]] == ["eager", "onnxruntime-cpu:model.onnx"]
    refused = wm(capfd, "parity", bundle, "--runtimes", "eager:model.onnx")
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert "eager runs no graph" in refused.err
