"""Hugging Face folders: config.json, safetensors (whole or sharded), tokenizer.json and the files around it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from wm_graph.checkpoints import INDEX, WEIGHTS, load_tensors, read_json
from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.importers.families import FAMILIES
from wm_graph.importers.family import family_layout, read_config
from wm_graph.importers.fields import Fields, clip
from wm_graph.importers.generation import make_generation
from wm_graph.importers.imported import Imported
from wm_graph.importers.layout import Progress, assemble, check_layer_count
from wm_graph.shapes import Shape


class FolderTensors:
    """The tensors of a folder's safetensors files; see `layout.TensorSource`. Rotary tables, which old versions saved, are left out."""

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._folder = folder
        self._tensors = {name: value for name, value in load_tensors(folder).items() if not name.endswith(".rotary_emb.inv_freq")}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped."""
        return self._tensors[name]

    def place(self, name: str) -> str:
        """The file that holds a tensor; where none does, the shard that should, or the index that does not know the tensor."""
        index = self._folder / INDEX
        if not index.exists():
            return str(self._folder / WEIGHTS)
        shards: dict[str, str] = read_json(index)["weight_map"]
        for shard in sorted(set(shards.values()), reverse=True):  # of two that hold it, `load_tensors` takes the last
            with safe_open(self._folder / shard, framework="pt") as handle:
                if name in handle.keys():  # noqa: SIM118 (not a dict)
                    return str(self._folder / shard)
        return str(self._folder / shards[name] if name in shards else index)

    def drop_tied_head(self, head: str, embedding: str) -> None:
        """Forget a stored head that equals the embedding it is tied to.

        Raises:
            CheckpointError: it differs.
        """
        if head not in self._tensors or embedding not in self._tensors:
            return
        if not torch.equal(self._tensors[head], self._tensors[embedding]):
            raise CheckpointError(f"{self.place(head)}: tie_word_embeddings is true, but tensor {head!r} differs from the embedding")
        del self._tensors[head]


def import_hf_folder(folder: Path, progress: Progress | None = None, dtype: torch.dtype | None = None) -> Imported:
    """Read a Hugging Face folder of an architecture in `FAMILIES`; arguments and errors as `import_source`."""
    fields = Fields(str(folder / "config.json"), read_json(folder / "config.json"))
    if "model_type" not in fields.values and "layers" in fields.values:
        raise CheckpointError(f"{folder}: is a checkpoint of wm-graph already; no import is needed")
    kind = fields.text("model_type")
    if kind not in FAMILIES:
        raise fields.unsupported("model_type", f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    source = FolderTensors(folder)
    check_layer_count(source, "num_hidden_layers", fields.integer("num_hidden_layers"))
    cfg = read_config(family, fields, folder.resolve().name or "imported")
    if cfg.tie_embeddings:
        source.drop_tied_head(*family.tensors["head"], *family.tensors["embedding"])
    tokenizer_json, tokenizer = _read_tokenizer(folder, cfg)
    generation = _read_generation(folder, cfg, fields, tokenizer)
    return Imported(cfg, assemble(source, family_layout(family, cfg, source.shapes), dtype, progress), tokenizer_json, generation)


def _read_tokenizer(folder: Path, cfg: ModelConfig) -> tuple[str | None, Tokenizer | None]:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None, None
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: not a readable tokenizer ({clip(str(error))}); fetch it again") from error
    used = max(tokenizer.get_vocab().values(), default=-1)
    if used >= cfg.vocab_size:
        raise CheckpointError(f"{path}: holds token id {used}; expected ids below the model's vocabulary of {cfg.vocab_size}")
    return text, tokenizer


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_generation(folder: Path, cfg: ModelConfig, config: Fields, tokenizer: Tokenizer | None) -> dict[str, Any]:
    saved = Fields(str(folder / "generation_config.json"), _optional_json(folder / "generation_config.json"))
    about = Fields(str(folder / "tokenizer_config.json"), _optional_json(folder / "tokenizer_config.json"))

    def token_to_id(text: str) -> int | None:
        return None if tokenizer is None else tokenizer.token_to_id(text)

    def ids(name: str) -> list[int]:
        for fields in (saved, config):
            key = f"{name}_token_id"
            if isinstance(fields.values.get(key), list):
                return fields.integers(key)
            if (token := fields.optional_id(key)) is not None:
                return [token]
        named = about.values.get(f"{name}_token")
        named = named.get("content") if isinstance(named, dict) else named
        token = token_to_id(named) if isinstance(named, str) else None
        return [] if token is None else [token]

    bos, pad = next(iter(ids("bos")), None), next(iter(ids("pad")), None)
    add_bos = about.flag("add_bos_token", _adds_bos(tokenizer, bos)) and bos is not None
    template = _read_template(folder, about)
    return make_generation(
        str(folder), cfg.vocab_size, token_to_id, bos=bos, eos=ids("eos"), pad=pad, add_bos=add_bos, chat_template=template
    )


def _adds_bos(tokenizer: Tokenizer | None, bos: int | None) -> bool:
    """Whether the tokenizer's own post-processing begins a text with bos; only some tokenizer_config.json files say so."""
    if tokenizer is None or bos is None:
        return False
    return tokenizer.encode("a").ids[:1] == [bos] and tokenizer.encode("a", add_special_tokens=False).ids[:1] != [bos]


def _read_template(folder: Path, about: Fields) -> str | None:
    """The chat template of a file of its own or of tokenizer_config.json; of several named ones, the default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({clip(str(error))})") from error
    templates = about.values.get("chat_template")
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        return Fields(about.label, {"chat_template": named.get("default")}).optional_text("chat_template")
    return about.optional_text("chat_template")
