"""What an importer gives, and how it becomes a checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wm_graph.checkpoints import save_checkpoint
from wm_graph.config import ModelConfig
from wm_graph.params import params_from_flat


@dataclass(frozen=True)
class Imported:
    """A model in wm-graph's own names and layouts.

    Attributes:
        cfg: the configuration.
        tensors: flat parameter name -> tensor, in model order.
        tokenizer_json: the text of a tokenizer.json, or None when the source has no tokenizer.
        generation: `{"tokens": {"bos", "eos", "pad", "stop", "add_bos"}, "chat_template"}` as in a bundle's manifest. Encode text without
            special tokens and put `bos` in front when `add_bos` is true.
    """

    cfg: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer_json: str | None
    generation: dict[str, Any]


def write_imported(imported: Imported, directory: str | Path) -> None:
    """Write a checkpoint of an imported model: config.json, model.safetensors, generation.json and, where there is one, tokenizer.json.

    Raises:
        CheckpointError: the folder is taken or cannot be written; nothing is left behind.
    """
    files = {"generation.json": json.dumps(imported.generation, indent=2, ensure_ascii=False) + "\n"}
    if imported.tokenizer_json is not None:
        files["tokenizer.json"] = imported.tokenizer_json
    save_checkpoint(directory, imported.cfg, params_from_flat(imported.cfg, imported.tensors), files)
