"""`wm init`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.console import human_count, print_json


def command(
    preset: Annotated[str, typer.Argument(help="Name of a preset; `wm presets` lists them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint folder.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random parameters.")] = 0,
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Dtype of the parameters.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a preset, with random parameters.

    The byte-level tokenizer comes with it, so that text goes in and out at once.
    """
    parameters = init_checkpoint(preset, output, seed, dtype)
    if as_json:
        print_json({"checkpoint": str(output), "preset": preset, "parameters": parameters, "dtype": dtype, "seed": seed})
    else:
        print(f"{output}: {preset}, {human_count(parameters)} random parameters in {dtype}, seed {seed}")
        print(f"next: wm export {output} -o BUNDLE")


def init_checkpoint(preset: str, output: Path, seed: int = 0, dtype: str = "fp32") -> int:
    """Write the checkpoint and return its number of parameters.

    Raises:
        ConfigError: the preset is unknown.
        CheckpointError: the folder is taken or cannot be written.
    """
    from wm_graph.cli.checks import refuse_existing
    from wm_graph.presets import preset as find_preset

    cfg = find_preset(preset)
    refuse_existing(output)
    import torch

    from wm_graph.checkpoints import save_checkpoint
    from wm_graph.data import tokenizer_path
    from wm_graph.params import init_params, parameter_count

    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    params = init_params(cfg, seed=seed, dtype=torch_dtype)
    tokens = {"bos": 1, "eos": 2, "pad": 0, "stop": [2], "add_bos": True}
    generation = json.dumps({"tokens": tokens, "chat_template": None}, indent=2) + "\n"
    save_checkpoint(output, cfg, params, {"tokenizer.json": tokenizer_path().read_text(encoding="utf-8"), "generation.json": generation})
    return parameter_count(params)
