"""The peers: an environment for each, since their versions clash, and the models in their formats, all under one cache folder."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "peers"


class NotRun(Exception):
    """Something cannot be measured here; the message is the reason, in one line."""


@dataclass(frozen=True)
class Peer:
    """A tool to compare with: `name` in the tables, its environment, its runner and the folder of its model."""

    name: str
    environment: str
    runner: str
    model: str


PEERS = (
    Peer("transformers eager", "transformers", "run_transformers.py", "smollm2-hf"),
    Peer("onnxruntime-genai", "genai", "run_genai.py", "smollm2-genai"),
    Peer("mobius, onnxruntime", "mobius", "run_mobius.py", "smollm2-mobius"),
    Peer("mobius --ep cpu, onnxruntime", "mobius", "run_mobius.py", "smollm2-mobius-cpu"),
)
MAMBA2 = HERE / "make_mamba2.py"  # the source of the models mamba2-*
MAMBA2_PEER = Peer("mobius, onnxruntime", "mobius", "run_mobius_states.py", "mamba2-mobius")


def call(command: list[object], what: str) -> str:
    """Run a command to its end and return its stdout.

    Raises:
        NotRun: it failed; the reason is the last line that it printed.
    """
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environ)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NotRun(f"{what}: {lines[-1][:200] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def environment(cache: Path, name: str) -> Path:
    """The interpreter of an environment made from peers/NAME.txt, made anew when that file has changed."""
    pins = HERE / f"{name}.txt"
    folder = cache / name
    python = folder / "bin" / "python"
    if not _is_current(folder, mark := hashlib.sha256(pins.read_bytes()).hexdigest()):
        print(f"setting up {name}", file=sys.stderr)
        call([sys.executable, "-m", "venv", "--clear", folder], f"{name}: venv")
        torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
        for what in ([torch], ["-r", pins]):  # torch first and by its pin: an open range elsewhere would take gigabytes of CUDA with it
            call([python, "-m", "pip", "install", "--quiet", *what], f"{name}: pip")
        (folder / ".ready").write_text(mark)
    return python


def model(cache: Path, name: str, source: Path) -> Path:
    """The folder of a model in a peer's format, made of a GGUF file or by a script, on first use and when that has changed.

    Raises:
        NotRun: it cannot be made.
    """
    folder = cache / "models" / name
    if not _is_current(folder, mark := _mark(source)):
        print(f"making {name}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _MAKERS[name](cache, folder, source)
        (folder / ".ready").write_text(mark)
    return folder


def _mark(source: Path) -> str:
    """What tells one source from another: a script by its content, a file of weights by its size."""
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.suffix == ".py" else f"{source.name} {source.stat().st_size}"


def _is_current(folder: Path, mark: str) -> bool:
    ready = folder / ".ready"
    return ready.exists() and ready.read_text() == mark


def _make_hf(cache: Path, folder: Path, gguf: Path) -> None:
    call([environment(cache, "convert"), HERE / "convert_gguf.py", gguf, folder], "GGUF to safetensors")


def _make_genai(cache: Path, folder: Path, gguf: Path) -> None:
    source = model(cache, "smollm2-hf", gguf)
    builder = [environment(cache, "genai"), "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-p", "fp32", "-e", "cpu"]
    call([*builder, "-c", cache / "models" / "genai-cache", "--extra_options", "hf_token=false"], "onnxruntime-genai's builder")


def _make_mobius(cache: Path, folder: Path, gguf: Path, ep: str = "default") -> None:
    source = model(cache, "smollm2-hf", gguf)
    build = [environment(cache, "mobius"), "-m", "mobius", "build", "--config", source, "--dtype", "f32", "--ep", ep, folder]
    call(build, "mobius build")
    shutil.copy(source / "tokenizer.json", folder)


def _make_mamba2(cache: Path, folder: Path, script: Path) -> None:
    call([environment(cache, "convert"), script, folder], script.name)


def _make_mamba2_mobius(cache: Path, folder: Path, script: Path) -> None:
    source = model(cache, "mamba2-hf", script)
    # --model takes a folder too; --config looks up the wrong configuration class for Mamba2 in 0.1.0. --ep cpu makes the same graph.
    build = [environment(cache, "mobius"), "-m", "mobius", "build", "--model", source, "--dtype", "f32", folder]
    call(build, "mobius build")


_MAKERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "smollm2-hf": _make_hf,
    "smollm2-genai": _make_genai,
    "smollm2-mobius": _make_mobius,
    "smollm2-mobius-cpu": lambda cache, folder, gguf: _make_mobius(cache, folder, gguf, "cpu"),
    "mamba2-hf": _make_mamba2,
    "mamba2-mobius": _make_mamba2_mobius,
}
