"""`wm import`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.checks import refuse_existing
from wm_graph.cli.console import human_count, print_json, progress_bar


def command(
    source: Annotated[
        Path, typer.Argument(help="A .gguf file (Llama family) or a Hugging Face folder (Llama, Doge, Mamba2, Jamba, Bamba).")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")],
    dtype: Annotated[
        Literal["keep", "fp32", "fp16", "bf16"], typer.Option(help="Dtype of the parameters; keep makes fp32 of quantised ones.")
    ] = "keep",
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a GGUF file or Hugging Face folder.

    The tokenizer and the chat template come with it.
    """
    from wm_graph.errors import CheckpointError

    refuse_existing(output)
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; name a .gguf file or a Hugging Face folder")
    import torch

    from wm_graph.importers import import_source, write_imported
    from wm_graph.shapes import count_parameters

    chosen = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype)
    with progress_bar() as progress:
        imported = import_source(source, lambda name, done, total: progress(f"reading {name}", 0.9 * done / total), chosen)
        progress("writing the checkpoint", 0.9)
        write_imported(imported, output)
    parameters = count_parameters(imported.cfg)
    has_tokenizer, has_chat = imported.tokenizer_json is not None, imported.generation.get("chat_template") is not None
    if as_json:
        fields = {"checkpoint": str(output), "name": imported.cfg.name, "parameters": parameters}
        print_json({**fields, "tokenizer": has_tokenizer, "chat_template": has_chat})
        return
    found = f"{'a' if has_tokenizer else 'no'} tokenizer, {'a' if has_chat else 'no'} chat template"
    print(f"{output}: {imported.cfg.name}, {human_count(parameters)} parameters, {found}")
    print(f"next: wm export {output} -o BUNDLE")
