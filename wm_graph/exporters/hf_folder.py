"""Hugging Face folders of checkpoints: config.json, model.safetensors and what the checkpoint says about tokens and chat."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor

from wm_graph.checkpoints import WEIGHTS, load_checkpoint, new_folder, read_json
from wm_graph.errors import CheckpointError
from wm_graph.exporters.architecture import find_architecture
from wm_graph.importers.fields import Fields, clip
from wm_graph.importers.generation import make_generation
from wm_graph.importers.layout import make_layout, take_apart
from wm_graph.params import is_float32_always, params_to_flat


def export_hf_folder(checkpoint: str | Path, folder: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder that transformers loads, or write nothing.

    Its tensors are the checkpoint's, bit for bit. Decay rates, which a checkpoint holds in float32, get the dtype of the others where
    that loses nothing.

    Args:
        checkpoint: folder with config.json and model.safetensors, and optionally tokenizer.json and generation.json.
        folder: where to; must not exist, or be an empty folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder is taken or cannot be written.
        ExportError: no Hugging Face architecture describes the model.
    """
    checkpoint = Path(checkpoint)
    cfg, params = load_checkpoint(checkpoint)
    family, config = find_architecture(cfg)
    flat = params_to_flat(cfg, params)
    dtype = reduce(torch.promote_types, (tensor.dtype for name, tensor in flat.items() if not is_float32_always(name)))
    tensors = take_apart({name: _narrowed(name, tensor, dtype) for name, tensor in flat.items()}, make_layout(cfg, family.tensors))
    generation = _read_generation(checkpoint, cfg.vocab_size)
    ids = _token_ids(generation["tokens"])
    files = {
        "config.json": {**config, **ids, "dtype": str(dtype).removeprefix("torch.")},
        "generation_config.json": ids,
        **_tokenizer_files(checkpoint, generation["tokens"]),
        "chat_template.jinja": generation["chat_template"],
    }
    with new_folder(Path(folder)) as scratch:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        for name, content in files.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (scratch / name).write_text(text, encoding="utf-8")


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to(dtype)
    return tensor if is_float32_always(name) and not torch.equal(narrow.to(tensor.dtype), tensor) else narrow


def _read_generation(checkpoint: Path, vocab_size: int) -> dict[str, Any]:
    """What generation.json says, checked as on import."""
    path = checkpoint / "generation.json"
    values = read_json(path) if path.exists() else {}
    tokens = Fields(f"{path}: tokens", values.get("tokens") or {})
    eos, bos = tokens.optional_id("eos"), tokens.optional_id("bos")
    stop = tokens.integers("stop") if "stop" in tokens.values else []
    return make_generation(
        str(path),
        vocab_size,
        lambda text: None,
        bos=bos,
        eos=[token for token in dict.fromkeys([eos, *stop]) if token is not None],
        pad=tokens.optional_id("pad"),
        add_bos=tokens.flag("add_bos", False),
        chat_template=Fields(str(path), values).optional_text("chat_template"),
    )


def _token_ids(tokens: dict[str, Any]) -> dict[str, Any]:
    """Ids as transformers names them. None is written too: it replaces a default that may lie outside the vocabulary."""
    stop = tokens["stop"]
    eos = stop if len(stop) > 1 else next(iter(stop), None)
    return {"bos_token_id": tokens["bos"], "eos_token_id": eos, "pad_token_id": tokens["pad"]}


def _tokenizer_files(checkpoint: Path, tokens: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json, which puts bos in front by itself where prompts begin with it, and tokenizer_config.json; none without the first."""
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer ({clip(str(error))}); import the model again") from error
    named = {f"{name}_token": tokenizer.id_to_token(tokens[name]) for name in ("bos", "eos", "pad") if tokens[name] is not None}
    if tokens["add_bos"] and tokenizer.encode("a").ids[:1] != [tokens["bos"]]:
        bos = named["bos_token"]
        first = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", [(bos, tokens["bos"])])
        own = tokenizer.post_processor
        tokenizer.post_processor = first if own is None else processors.Sequence([own, first])
        text = tokenizer.to_str(pretty=True)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokens["add_bos"], **named}
    return {"tokenizer.json": text, "tokenizer_config.json": about}
