"""`wm export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wm_graph.cli.checks import refuse_existing, refuse_hugging_face, split_names
from wm_graph.cli.console import human_bytes, print_fields, progress_bar
from wm_graph.errors import CheckpointError, ConfigError
from wm_graph.quiet import quiet_libraries

TARGETS = ("onnx", "hf")


def command(
    checkpoint: Annotated[Path | None, typer.Argument(help="The checkpoint folder.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The new bundle, or Hugging Face folder.")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="A bundle to which the targets are added, from its own weights.")] = None,
    targets: Annotated[str, typer.Option(help="What to make: onnx, or hf, a Hugging Face folder, which is no bundle.")] = "onnx",
    dtype: Annotated[Literal["fp32", "fp16"] | None, typer.Option(help="Dtype of a new bundle.  [default: fp32]")] = None,
) -> None:
    """Make a bundle of a checkpoint, or a Hugging Face folder.

    A bundle is a folder with the ONNX files, their weights, the tokenizer, golden data, and a manifest with the hash of each. A Hugging
    Face folder is one that transformers loads, of a model that it knows, with the checkpoint's parameters bit for bit.
    """
    names = split_names(targets, TARGETS, "target")
    if (output is None) == (into is None):
        raise ConfigError("give either -o BUNDLE for a new bundle or --into BUNDLE for one that exists")
    if "hf" in names:
        _check_alone(names, into, dtype)
    if into is not None:
        if checkpoint is not None or dtype is not None:
            raise ConfigError("--into takes weights and dtype from the bundle; leave out the checkpoint folder and --dtype")
        with progress_bar() as progress, quiet_libraries():
            from wm_export import export_into

            export_into(into, targets=names, progress=progress)
        _show(into)
        return
    if checkpoint is None:
        raise ConfigError("name the checkpoint folder: wm export DIR -o BUNDLE; `wm init` or `wm import` makes one")
    assert output is not None
    if names == ["hf"]:
        _export_folder(checkpoint, output)
        return
    export_checkpoint(checkpoint, output, names, dtype or "fp32")
    _show(output)


def export_checkpoint(checkpoint: Path, output: Path, targets: list[str], dtype: str) -> None:
    """Export under a progress bar, after checks that need no torch."""
    _check_paths(checkpoint, output)
    with progress_bar() as progress, quiet_libraries():
        progress("loading torch", 0.0)
        from wm_export import export_bundle

        export_bundle(checkpoint, output, targets=targets, dtype=dtype, progress=progress)


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
    print_fields({f"  {file.name}": human_bytes(file.stat().st_size) for file in sorted(folder.iterdir())})
    print(f"next: {following or f'wm check {folder}, wm generate {folder} --prompt TEXT'}")
