"""Checkpoints: a folder of config.json and safetensors, written atomically and checked on reading. No pickle."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.params import Params, is_float32_always, params_from_flat, params_to_flat

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_checkpoint(directory: str | Path, cfg: ModelConfig, params: Params, extra_files: dict[str, str] | None = None) -> None:
    """Write config.json, model.safetensors and extra text files into a new folder, or not at all.

    Args:
        directory: where to; must not exist, or be an empty folder.
        cfg: the model.
        params: its parameters; every float dtype is kept.
        extra_files: name -> text, such as tokenizer.json and generation.json.

    Raises:
        CheckpointError: the folder is taken or cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in params_to_flat(cfg, params).items()}
    with new_folder(Path(directory)) as scratch:
        (scratch / "config.json").write_text(cfg.to_json())
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        for name, text in (extra_files or {}).items():
            (scratch / name).write_text(text)


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A scratch folder beside `directory` that takes its name on success and vanishes on failure.

    Raises:
        CheckpointError: `directory` exists and is not an empty folder, or its parent cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: already exists and is not an empty folder; name a new folder")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot write here ({error.strerror}); name a folder you may write") from error
    try:
        scratch.chmod(0o755)
        yield scratch
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if directory.exists():
            directory.rmdir()
        os.rename(scratch, directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def load_checkpoint(directory: str | Path, dtype: torch.dtype | None = None) -> tuple[ModelConfig, Params]:
    """Read a checkpoint folder.

    Args:
        directory: a folder with config.json and model.safetensors (or shards and their index).
        dtype: cast to this; None keeps the stored dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors do not fit the configuration.
        ConfigError: config.json is not a ModelConfig.
    """
    directory = Path(directory)
    cfg = ModelConfig.from_json(read_text(directory / "config.json", "a checkpoint folder has config.json and model.safetensors"))
    return cfg, params_from_flat(cfg, load_tensors(directory, dtype))


def load_tensors(directory: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors file or shards, by name; tensors are memory-mapped until they are written to or cast."""
    if (directory / INDEX).exists():
        files = _shards(directory)
    elif (directory / WEIGHTS).exists():
        files = [directory / WEIGHTS]
    else:
        raise CheckpointError(f"{directory}: no {WEIGHTS} and no {INDEX}; is this a checkpoint folder?")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    return {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or holds a dtype that is no float.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({str(error).splitlines()[0]}); fetch or write it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{file}: tensor {name!r} is {tensor.dtype}, expected float64, float32, float16 or bfloat16")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError naming it."""
    text = read_text(file, "it belongs to the checkpoint")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad syntax, or a number of absurd length
        raise CheckpointError(f"{file}: not valid JSON ({str(error).splitlines()[0]}); write it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor
    return tensor.to(torch.promote_types(dtype, torch.float32) if is_float32_always(name) else dtype)


def _shards(directory: Path) -> list[Path]:
    mapping = read_json(directory / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
        raise CheckpointError(f"{directory / INDEX}: expected an object 'weight_map' of tensor name -> file name")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{directory / INDEX}: shard {name!r} is not a plain file name; shards must lie beside the index")
    return [directory / name for name in names]


def read_text(file: Path, hint: str) -> str:
    """The text of a file, or CheckpointError naming it; `hint` says why it should be there."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; {hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
