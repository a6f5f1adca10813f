"""Wrong or damaged input to `wm`: exactly one line on stderr, the right exit code, and nothing written."""

import errno
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cli_support import make_bundle, wm
from wm_export.weights import write_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture
def checkpoint(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "checkpoint")


@pytest.fixture
def bundle(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "bundle")


@pytest.fixture
def refused(capfd, tmp_path):
    """Run `wm`, which must fail with one line and leave every file as it is; gives the line."""

    def run(*argv, code=2):
        before = contents(tmp_path)
        result = wm(capfd, *argv)
        assert result.code == code, result
        assert result.out == ""
        assert result.err.startswith("wm: error: "), result.err
        assert result.err.count("\n") == 1, result.err
        assert contents(tmp_path) == before
        return result.err.removeprefix("wm: error: ").strip()

    return run


def contents(folder):
    """Every path below a folder, with the hash of files."""
    return {path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None for path in folder.rglob("*")}


def change_manifest(bundle, change):
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def change_weights(bundle, change):
    """Change the weights and make the manifest's hash and size fit, as a damaged exporter would."""
    file = bundle / "model.safetensors"
    tensors = load_file(file)
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    change(tensors)
    write_weights({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, file)
    assert file.read_bytes().startswith(header)
    entry = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size}
    change_manifest(bundle, lambda manifest: manifest["files"].update({"model.safetensors": entry}))


def truncate(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


# The command line itself.


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("nothing",), "nothing"),
        (("--nothing",), "--nothing"),
        (("init",), "preset"),
        (("init", "cheems-tiny"), "--output"),
        (("init", "cheems-tiny", "-o", "x", "--dtype", "fp8"), "fp8"),
        (("init", "cheems-tiny", "-o", "x", "--seed", "-1"), "--seed"),
        (("info", "cheems-tiny", "--capacity", "0"), "--capacity"),
        (("export",), "-o BUNDLE"),
        (("export", "-o", "x"), "checkpoint"),
        (("export", "x", "-o", "y", "--into", "z"), "either"),
        (("export", "x", "--into", "z"), "leave out"),
        (("export", "x", "-o", "y", "--targets", "abacus"), "abacus"),
        (("export", "x", "-o", "y", "--targets", ","), "onnx"),
        (("bench", "x", "--runtimes", "abacus"), "abacus"),
        (("parity", "x", "--runtimes", "eager,abacus"), "abacus"),
        (("check", "x", "--runtimes", "abacus"), "abacus"),
        (("parity", "x", "--draws", "0"), "--draws"),
    ],
)
def test_wrong_command_lines(refused, argv, says):
    assert says in refused(*argv)


@pytest.mark.parametrize("argv", [("init", "cheems-7t", "-o", "x"), ("info", "cheems-7t")])
def test_unknown_presets(refused, argv):
    assert "cheems-7t" in refused(*argv)


@pytest.mark.parametrize("name", ["export", "import", "check", "parity", "bench", "generate"])
def test_paths_that_do_not_exist(refused, tmp_path, name):
    rest = {"export": ("-o", tmp_path / "out"), "import": ("-o", tmp_path / "out"), "generate": ("--prompt", "a")}.get(name, ())
    assert "no such" in refused(name, tmp_path / "absent", *rest)


def test_export_into_a_folder_that_is_no_bundle(refused, tmp_path, checkpoint):
    assert "no manifest.json" in refused("export", "--into", checkpoint)


# Output folders.


@pytest.mark.parametrize("command", ["init", "import", "export"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_that_exists(refused, checkpoint, tmp_path, command, kind):
    taken = tmp_path / "taken"
    if kind == "folder":
        taken.mkdir()
        (taken / "mine").write_text("keep me")
    else:
        taken.write_text("keep me")
    source = {"init": "cheems-tiny", "import": checkpoint, "export": checkpoint}[command]
    assert "already exists" in refused(command, source, "-o", taken)


def test_output_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("init", "cheems-tiny", "-o", tmp_path / "file" / "new")


def test_demo_refuses_a_folder_that_it_did_not_make(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    assert "thesis.txt" in refused("demo", "-o", tmp_path / "mine")


# Checkpoints and sources of imports.


@pytest.mark.parametrize("command", ["export", "info"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: truncate(folder / "model.safetensors"),
        lambda folder: truncate(folder / "model.safetensors", 0.001),
        lambda folder: (folder / "model.safetensors").write_bytes(b"not safetensors at all"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: truncate(folder / "config.json"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "config.json").unlink(),
    ],
    ids=["half", "headless", "nonsense", "no weights", "half config", "config list", "config bytes", "no config"],
)
def test_damaged_checkpoints(refused, checkpoint, tmp_path, command, damage):
    damage(checkpoint)
    refused(command, checkpoint, *(("-o", tmp_path / "out") if command == "export" else ()))


def test_weights_with_nan_are_not_exported(refused, checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["norm"][0] = np.nan
    save_file(tensors, checkpoint / "model.safetensors")
    assert "'norm' holds NaN" in refused("export", checkpoint, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"GGUF\x03\0\0\0" + 16 * b"\xff", b"nonsense" * 100], ids=["empty", "magic", "counts", "text"]
)
def test_damaged_gguf(refused, tmp_path, data):
    (tmp_path / "model.gguf").write_bytes(data)
    assert "model.gguf" in refused("import", tmp_path / "model.gguf", "-o", tmp_path / "out")


def test_truncated_gguf(refused, tmp_path):
    pytest.importorskip("transformers")
    from import_sources import byte_vocabulary, make_llama, write_gguf

    file = tmp_path / "model.gguf"
    write_gguf(file, make_llama(vocab_size=300), vocabulary=byte_vocabulary("gpt-2"))
    whole = file.read_bytes()
    for keep in (0.02, 0.5, 0.99):
        file.write_bytes(whole[: int(len(whole) * keep)])
        assert "model.gguf" in refused("import", file, "-o", tmp_path / "out")


def test_pickled_weights_are_not_imported(refused, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refused("import", tmp_path / "model.bin", "-o", tmp_path / "out")


# Bundles.


def escape(bundle):
    change_manifest(bundle, lambda manifest: manifest["files"].update({"../secret": manifest["files"]["model.onnx"]}))


def link_out(bundle):
    shutil.move(bundle / "model.ort.onnx", bundle.parent / "elsewhere.onnx")
    (bundle / "model.ort.onnx").symlink_to(bundle.parent / "elsewhere.onnx")


@pytest.mark.parametrize("command", ["info", "check", "parity", "bench", "generate"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: truncate(bundle / "manifest.json"),
        lambda bundle: (bundle / "manifest.json").write_text("{}"),
        lambda bundle: truncate(bundle / "model.safetensors"),
        lambda bundle: truncate(bundle / "model.ort.onnx"),
        lambda bundle: (bundle / "model.onnx").unlink(),
        lambda bundle: (bundle / "model.ort.onnx").write_bytes(b"\xff" * (bundle / "model.ort.onnx").stat().st_size),
        escape,
        link_out,
    ],
    ids=["half manifest", "empty manifest", "half weights", "half ONNX", "no ONNX", "corrupt ONNX", "path outside", "link outside"],
)
def test_damaged_bundles(refused, bundle, command, damage):
    damage(bundle)
    refused(command, bundle, *(("--prompt", "a") if command == "generate" else ()))


def test_corrupt_nodes_inside_an_onnx_file(refused, bundle):
    """The outermost layer still parses, so that only ONNX Runtime can tell."""
    file = bundle / "model.ort.onnx"
    file.write_bytes(file.read_bytes().replace(b"Softplus", b"Softness"))
    assert "model.ort.onnx" in refused("generate", bundle, "--prompt", "a")


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx", "model.ort.onnx", "tokenizer.json", "golden.safetensors"])
def test_check_notices_one_wrong_bit(refused, bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[-5] ^= 1
    (bundle / name).write_bytes(data)
    line = refused("check", bundle)
    assert name in line
    assert "SHA-256" in line or "damaged" in line


def test_weights_with_nan_give_no_text(refused, bundle):
    change_weights(bundle, lambda tensors: tensors["norm"].__setitem__(0, np.nan))
    for runtime in ("eager", "onnxruntime-cpu"):
        assert "not finite" in refused("generate", bundle, "--prompt", "a", "--runtime", runtime)


@pytest.mark.parametrize("command", ["check", "parity", "bench"])
def test_weights_with_nan_are_damaged_input_to_every_command(refused, bundle, command):
    change_weights(bundle, lambda tensors: tensors["norm"].__setitem__(0, np.nan))
    assert "not finite" in refused(command, bundle, "--runtimes", "onnxruntime-cpu")


def test_weights_with_nan_are_not_exported_into_their_bundle(refused, bundle):
    change_weights(bundle, lambda tensors: tensors["norm"].__setitem__(0, np.nan))
    before = (bundle / "manifest.json").read_bytes()
    assert "'norm' holds NaN" in refused("export", "--into", bundle, "--targets", "onnx")
    assert (bundle / "manifest.json").read_bytes() == before


def test_numbers_out_of_budget_are_exit_code_1(capfd, bundle):
    change_weights(bundle, lambda tensors: tensors["norm"].__setitem__(slice(None), 1.01))
    result = wm(capfd, "check", bundle, "--runtimes", "onnxruntime-cpu")
    assert result.code == 1
    assert "FAILED" in result.out
    assert result.err.startswith("wm: error: cheems-tiny: out of budget: onnxruntime-cpu")
    assert result.err.count("\n") == 1


# Generation.


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "--prompt"),
        (("--prompt", "a", "--runtime", "abacus"), "abacus"),
        (("--prompt-ids", "1,512"), "512"),
        (("--prompt-ids", "-1"), "-1"),
        (("--prompt-ids", "1,two"), "two"),
        (("--prompt-ids", "99999999999999999999"), "99999999999999999999"),
        (("--prompt-ids", ""), "no tokens"),
        (("--prompt-file", "absent.txt"), "absent.txt"),
        (("--prompt", "a", "--stop-id", "512"), "512"),
        (("--prompt", "a", "--stop", ""), "stop"),
        (("--prompt", "a", "--temperature", "nan"), "temperature"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--temperature", "hot"), "--temperature"),
        (("--prompt", "a", "--top-k", "-1"), "top_k"),
        (("--prompt", "a", "--top-p", "0"), "top_p"),
        (("--prompt", "a", "--top-p", "1.5"), "top_p"),
        (("--prompt", "a", "--seed", "-1"), "--seed"),
        (("--prompt", "a", "--max-tokens", "0"), "--max-tokens"),
        (("--prompt", "a", "--capacity", "0"), "--capacity"),
        (("--prompt", "abcdef", "--capacity", "6"), "capacity"),
        (("--prompt", "a", "--max-tokens", "99999999999"), "capacity"),
        (("--prompt", "a", "--system", "b"), "--chat"),
        (("--prompt", "a", "--chat"), "chat template"),
        (("--prompt-ids", "1", "--chat"), "--chat"),
    ],
)
def test_wrong_generation_options(refused, bundle, argv, says):
    assert says in refused("generate", bundle, *argv)


def test_a_prompt_file_that_is_not_text(refused, bundle, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused("generate", bundle, "--prompt-file", tmp_path / "prompt")


def test_a_bundle_without_a_tokenizer_takes_ids_only(capfd, refused, bundle):
    (bundle / "tokenizer.json").unlink()
    change_manifest(bundle, lambda manifest: manifest["files"].pop("tokenizer.json"))
    assert "tokenizer.json" in refused("generate", bundle, "--prompt", "a")
    result = wm(capfd, "generate", bundle, "--prompt-ids", "1 2 3", "--max-tokens", 4)
    assert result.code == 0
    assert len(result.out.split()) == 4


# Evaluation.


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text("a few words")
    return tmp_path / "words.txt"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--runtime", "abacus"), "abacus"),
        (("--runtime", "onnxruntime-cpu:abacus"), "abacus"),
        (("--context", "1"), "--context"),
        (("--context", "16777217"), "expected 2..16777216"),
        (("--batch", "0"), "--batch"),
        (("--buckets", ""), "--buckets"),
        (("--buckets", "128,many"), "'many'"),
        (("--buckets", "-128"), "'-128'"),
        (("--buckets", "0,128"), "rising"),
        (("--buckets", "128,128"), "rising"),
        (("--buckets", "512,128"), "rising"),
    ],
)
def test_wrong_evaluation_options(refused, bundle, words, argv, says):
    assert says in refused("eval", bundle, "--text", words, *argv)


@pytest.mark.parametrize(("data", "says"), [(None, "cannot be read"), (b"", "0 tokens"), (b"\xff\xfe", "UTF-8")])
def test_files_that_cannot_be_evaluated(refused, bundle, words, data, says):
    words.unlink() if data is None else words.write_bytes(data)
    line = refused("eval", bundle, "--text", words)
    assert says in line


def test_one_token_without_bos_predicts_nothing(refused, bundle, words):
    change_manifest(bundle, lambda manifest: manifest["tokens"].update(add_bos=False))
    words.write_text("a")
    assert "1 token, expected at least 2" in refused("eval", bundle, "--text", words)


def test_evaluation_needs_a_text_and_a_tokenizer(refused, bundle, words):
    assert "--text" in refused("eval", bundle)
    (bundle / "tokenizer.json").unlink()
    change_manifest(bundle, lambda manifest: manifest["files"].pop("tokenizer.json"))
    assert "tokenizer.json" in refused("eval", bundle, "--text", words)


def test_evaluation_of_weights_with_nan(refused, bundle, words):
    change_weights(bundle, lambda tensors: tensors["norm"].__setitem__(0, np.nan))
    assert "not finite" in refused("eval", bundle, "--text", words)


def test_evaluation_in_a_runtime_that_cannot_run_here(refused, bundle, words, monkeypatch):
    monkeypatch.setattr("wm_runtimes.onnxruntime_cpu.availability", lambda runtime="": "its engine is out of coal")
    assert refused("eval", bundle, "--text", words, code=3) == "onnxruntime-cpu: its engine is out of coal"


# What is nobody's mistake.


@pytest.mark.parametrize("command", ["generate", "parity", "bench", "check"])
def test_a_runtime_that_cannot_run_here_is_exit_code_3(refused, bundle, monkeypatch, command):
    monkeypatch.setattr("wm_runtimes.onnxruntime_cpu.availability", lambda runtime="": "its engine is out of coal")
    rest = ("--prompt", "a") if command == "generate" else ("--runtimes", "onnxruntime-cpu")
    assert refused(command, bundle, *rest, code=3) == "onnxruntime-cpu: its engine is out of coal"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 2, "not enough memory"),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            2,
            "not enough memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "out: No space left on device"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 3, "'onnx'"),
    ],
)
def test_expected_failures_are_one_line(refused, monkeypatch, error, code, says):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("wm_graph.cli.presets_command.print_table", fail)
    assert says in refused("presets", code=code)


def test_a_bug_shows_its_traceback_and_no_code_of_the_contract(capfd, monkeypatch):
    monkeypatch.setattr("wm_graph.cli.presets_command.print_table", lambda *arguments, **options: 1 / 0)
    result = wm(capfd, "presets")
    assert result.code == 70
    assert "ZeroDivisionError" in result.err
    assert "bug" in result.err.splitlines()[-1]


def test_an_interrupt_is_quiet(capfd, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("wm_graph.cli.presets_command.print_table", interrupt)
    result = wm(capfd, "presets")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_a_closed_pipe_is_quiet():
    script = "from wm_graph.cli import main; main(['presets', '--json'])"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
