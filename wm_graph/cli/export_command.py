"""`wm export`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from wm_graph.cli.checks import refuse_existing, refuse_hugging_face, split_names
from wm_graph.cli.console import human_bytes, print_fields, progress_bar
from wm_graph.errors import CheckpointError, ConfigError
from wm_graph.quiet import quiet_libraries

TARGETS = ("onnx", "native", "hf")


def command(
    checkpoint: Annotated[Path | None, typer.Argument(help="The checkpoint folder.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The new bundle, or Hugging Face folder.")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="A bundle to which the targets are added, from its own weights.")] = None,
    targets: Annotated[
        str, typer.Option(help="What to make, by commas: onnx; native, GPU kernels; or hf, a Hugging Face folder, which is no bundle.")
    ] = "onnx",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Dtype of a new bundle.  [default: fp32]")] = None,
    sm: Annotated[str, typer.Option("--sm", help="GPU architectures of target native, by commas: 80,90,100.")] = "",
) -> None:
    """Make a bundle of a checkpoint, or a Hugging Face folder.

    A bundle is a folder with the ONNX files, their weights, the tokenizer, golden data, and a manifest with the hash of each. Target native
    adds kernels/, the model's Triton kernels compiled for GPUs that need not be here. A Hugging Face folder is one that transformers loads,
    of a model that it knows, with the checkpoint's parameters bit for bit.
    """
    names, architectures = split_names(targets, TARGETS, "target"), _architectures(sm)
    if (output is None) == (into is None):
        raise ConfigError("give either -o BUNDLE for a new bundle or --into BUNDLE for one that exists")
    if "hf" in names:
        _check_alone(names, into, dtype)
    if into is not None:
        if checkpoint is not None or dtype is not None:
            raise ConfigError("--into takes weights and dtype from the bundle; leave out the checkpoint folder and --dtype")
        with progress_bar() as progress, quiet_libraries():
            from wm_export import export_into

            export_into(into, targets=names, architectures=architectures, progress=progress)
        _show(into)
        return
    if checkpoint is None:
        raise ConfigError("name the checkpoint folder: wm export DIR -o BUNDLE; `wm init` or `wm import` makes one")
    assert output is not None
    if names == ["hf"]:
        _export_folder(checkpoint, output)
        return
    export_checkpoint(checkpoint, output, names, dtype or "fp32", architectures)
    _show(output)


def _architectures(text: str) -> list[int]:
    """`80,90` as numbers."""
    names = list(dict.fromkeys(name.strip().removeprefix("sm_") for name in text.split(",") if name.strip()))
    if wrong := [name for name in names if not name.isdecimal()]:
        raise ConfigError(f"--sm: {wrong[0]!r} is no architecture; write numbers by commas, such as 80,90,100")
    return [int(name) for name in names]


def export_checkpoint(checkpoint: Path, output: Path, targets: list[str], dtype: str, architectures: Sequence[int] = ()) -> None:
    """Export under a progress bar, after checks that need no torch."""
    _check_paths(checkpoint, output)
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_export import export_bundle

        export_bundle(checkpoint, output, targets=targets, dtype=dtype, architectures=architectures, progress=progress)


def _check_paths(checkpoint: Path, output: Path) -> None:
    refuse_existing(output)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such checkpoint folder; `wm init` or `wm import` makes one")
    refuse_hugging_face(checkpoint)


def _check_alone(names: list[str], into: Path | None, dtype: str | None) -> None:
    if names != ["hf"] or into is not None:
        raise ConfigError("target hf makes a folder of its own, not part of a bundle: wm export DIR --targets hf -o FOLDER")
    if dtype is not None:
        raise ConfigError("target hf keeps the checkpoint's dtype; leave out --dtype, or choose one at `wm import`")


def _export_folder(checkpoint: Path, output: Path) -> None:
    _check_paths(checkpoint, output)
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_graph.exporters import export_hf_folder

        progress("writing the folder", 0.5)
        export_hf_folder(checkpoint, output)
    _show(output, f'AutoModelForCausalLM.from_pretrained("{output}") in transformers')


def _show(folder: Path, following: str | None = None) -> None:
    print(f"{folder}:")
    print_fields({f"  {path.name}{'/' if path.is_dir() else ''}": human_bytes(_size(path)) for path in sorted(folder.iterdir())})
    print(f"next: {following or f'wm check {folder}, wm generate {folder} --prompt TEXT'}")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
