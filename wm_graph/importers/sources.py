"""import_source: finds out what a path is and hands it to its reader."""

from pathlib import Path

import torch

from wm_graph.errors import CheckpointError
from wm_graph.importers.gguf_file import import_gguf
from wm_graph.importers.hf_folder import import_hf_folder
from wm_graph.importers.imported import Imported
from wm_graph.importers.layout import DTYPES, Progress

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def import_source(source: str | Path, progress: Progress | None = None, dtype: torch.dtype | None = None) -> Imported:
    """Read a model in another format.

    Args:
        source: a `.gguf` file or a folder with exactly one (Llama family), or a Hugging Face folder (see `families`) with
            config.json and safetensors, whole or sharded.
        progress: called as `progress(parameter, done, total)` after each parameter.
        dtype: float32, float16 or bfloat16; None keeps the source's own, and makes float32 of quantised and of mixed weights.

    Returns:
        The model. Nothing is written.

    Raises:
        CheckpointError: the source is missing, damaged, or a model that wm-graph does not have; one line says which key or tensor.
        RuntimeUnavailableError: a GGUF file needs the `gguf` package.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype {dtype} cannot be imported to; choose float32, float16 or bfloat16")
    source = Path(source)
    if source.is_dir():
        return _import_folder(source, progress, dtype)
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; name a .gguf file or a Hugging Face folder")
    if source.suffix.lower() in _PICKLES:
        raise CheckpointError(_pickle_line(source))
    if source.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{source}: name the folder that holds it together with config.json")
    return import_gguf(source, progress, dtype)


def _import_folder(folder: Path, progress: Progress | None, dtype: torch.dtype | None) -> Imported:
    ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if any(folder.glob("*.safetensors")):
        return import_hf_folder(folder, progress, dtype)
    if len(ggufs) == 1:
        return import_gguf(ggufs[0], progress, dtype)
    if ggufs:
        raise CheckpointError(f"{folder}: holds {len(ggufs)} GGUF files; name one, such as {ggufs[0].name}")
    if pickles := sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICKLES):
        raise CheckpointError(_pickle_line(pickles[0]))
    raise CheckpointError(f"{folder}: holds neither a .gguf file nor safetensors; name a .gguf file or a Hugging Face folder")


def _pickle_line(path: Path) -> str:
    return f"{path}: pickled weights can run code and are not read; convert them to safetensors (save_pretrained in transformers does)"
