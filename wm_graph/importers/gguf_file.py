"""GGUF files of the Llama family."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wm_graph.errors import CheckpointError
from wm_graph.importers import llama
from wm_graph.importers.fields import Fields
from wm_graph.importers.generation import make_generation
from wm_graph.importers.gguf_header import load_gguf_package, read_header
from wm_graph.importers.gguf_tokenizer import read_tokenizer
from wm_graph.importers.imported import Imported
from wm_graph.importers.layout import Progress, assemble, check_layer_count, make_layout
from wm_graph.shapes import Shape

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufTensors:
    """The tensors of a GGUF file, dequantised as they are read; see `layout.TensorSource`."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.label = str(path)
        self.fields = Fields(self.label, header.metadata)
        self._places = header.tensors
        self._data = np.memmap(path, dtype=np.uint8, mode="r")

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: place.shape for name, place in self._places.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Element type of one tensor; float32 for a quantised one."""
        return _PLAIN.get(self._places[name].kind, torch.float32)

    def place(self, name: str) -> str:
        """The file, whatever the tensor."""
        return self.label

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: the gguf package cannot dequantise its type.
        """
        place = self._places[name]
        raw = np.array(self._data[place.offset : place.offset + place.size])  # a copy: the map is read-only, torch wants to write
        if place.kind in _PLAIN:
            return torch.from_numpy(raw).view(_PLAIN[place.kind]).reshape(place.shape)
        package = load_gguf_package()
        try:
            values = package.quants.dequantize(raw.reshape(*place.shape[:-1], -1), package.GGMLQuantizationType[place.kind])
        except NotImplementedError as error:
            raise CheckpointError(f"{self.label}: tensor {name!r} is {place.kind}, which the gguf package cannot dequantise") from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(place.shape)


def import_gguf(path: Path, progress: Progress | None = None, dtype: torch.dtype | None = None) -> Imported:
    """Read a GGUF file of the Llama architecture; arguments and errors as `import_source`."""
    source = GgufTensors(path)
    fields = source.fields
    if fields.text("general.architecture") != "llama":
        raise fields.unsupported("general.architecture", "'llama'")
    if fields.integer("split.count", 1) > 1:
        raise CheckpointError(f"{path}: is one of {fields.integer('split.count')} parts; join them with llama-gguf-split --merge")
    if "rope_freqs.weight" in source.shapes:
        raise CheckpointError(
            f"{path}: tensor 'rope_freqs.weight' scales rotary frequencies one by one; import the Hugging Face folder, which holds the rule"
        )
    check_layer_count(source, "llama.block_count", fields.integer("llama.block_count"))
    vocab_size = source.shapes.get("token_embd.weight", (0,))[0] or fields.integer("llama.vocab_size")
    cfg = llama.gguf_config(fields, path.stem, vocab_size, tied="output.weight" not in source.shapes)
    tokenizer = read_tokenizer(fields, vocab_size)
    bos = fields.optional_id("tokenizer.ggml.bos_token_id")
    eos = [token for key in ("eos", "eot") if (token := fields.optional_id(f"tokenizer.ggml.{key}_token_id")) is not None]
    generation = make_generation(
        str(path),
        vocab_size,
        tokenizer.ids.get,
        bos=bos,
        eos=eos,
        pad=fields.optional_id("tokenizer.ggml.padding_token_id"),
        add_bos=fields.flag("tokenizer.ggml.add_bos_token", tokenizer.adds_bos and bos is not None),
        chat_template=fields.optional_text("tokenizer.chat_template"),
    )
    tensors = assemble(source, make_layout(cfg, llama.GGUF_NAMES, interleaved=True), dtype, progress)
    return Imported(cfg, tensors, tokenizer.json, generation)
