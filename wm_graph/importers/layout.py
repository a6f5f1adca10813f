"""Which tensors of a source make each parameter, and the checked, tensor by tensor copy.

A layout names, for every flat parameter, the source tensors that follow each other in its memory: mostly blocks of its rows. Sizes follow
from ModelConfig alone, so a source that does not fit is refused before anything is read, and a model is taken apart as it was put together.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.params import is_float32_always
from wm_graph.shapes import Shape, parameter_shapes

Progress = Callable[[str, int, int], None]  # parameter just read, how many are done, how many there are
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TensorSource(Protocol):
    """Named tensors in a file or in several."""

    @property
    def label(self) -> str:
        """The file or folder, for messages."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor held, row-major."""

    def dtype(self, name: str) -> torch.dtype:
        """Element type that `read` gives."""

    def place(self, name: str) -> str:
        """The file that holds a tensor or, where none does, should hold it; for messages."""

    def read(self, name: str) -> Tensor:
        """One tensor; raises CheckpointError when its data cannot be decoded."""


@dataclass(frozen=True)
class Piece:
    """One source tensor, as a block of a parameter's memory.

    Attributes:
        name: its name in the source.
        shape: its expected shape.
        interleaved_heads: heads whose rotary pairs lie next to each other in its rows; 0 where they are half-split already.
    """

    name: str
    shape: Shape
    interleaved_heads: int = 0


@dataclass(frozen=True)
class Parts:
    """A parameter's shape, and the pieces that follow each other in its memory."""

    shape: Shape
    pieces: tuple[Piece, ...]


Layout = dict[str, Parts]


def make_layout(cfg: ModelConfig, names: Mapping[str, tuple[str, ...]], interleaved: bool = False) -> Layout:
    """The layout of a model.

    Args:
        cfg: sizes and options.
        names: parameter name with `#` for the layer -> source names, in the order of the parameter's memory, with `#` for the layer and `*`
            for the expert; those with `*` are repeated for every expert.
        interleaved: queries and keys are stored for interleaved rotary embeddings.
    """
    heads = (cfg.n_head, cfg.n_kv_head, 0) if interleaved else (0, 0, 0)
    layout: Layout = {}
    for flat, whole in parameter_shapes(cfg).items():
        found = re.search(r"\d+", flat)
        index = found.group() if found else ""
        sources = [name.replace("#", index) for name in names[flat.replace(index, "#", 1) if found else flat]]
        leaf = flat.rsplit(".", 1)[-1]
        shape = (whole[0], 1, whole[1]) if leaf == "conv_weight" else whole  # torch's: one input channel for each output channel
        if any("*" in source for source in sources):
            sources, shape = [source.replace("*", str(expert)) for expert in range(shape[0]) for source in sources], shape[1:]
        rows = _rows(cfg, leaf, len(sources)) or shape[:1] * len(sources)
        turned = heads if leaf == "qkv" else (0,) * len(sources)
        pieces = (Piece(source, (count, *shape[1:]), head) for source, count, head in zip(sources, rows, turned, strict=True))
        layout[flat] = Parts(whole, tuple(pieces))
    return layout


def _rows(cfg: ModelConfig, leaf: str, pieces: int) -> tuple[int, ...]:
    """Rows of each piece of a parameter of several siblings; () for others."""
    if leaf in ("qkv", "qkv_bias"):
        return tuple(heads * cfg.head_dim for heads in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head))
    gated = leaf in ("gate_up", "gate_up_bias") or (leaf == "expert_in" and pieces > 1)
    return (cfg.d_ff,) * pieces if gated else ()


def check_layer_count(source: TensorSource, key: str, count: int) -> None:
    """Refuse a layer count that the tensors do not have, before a configuration of that many layers is built.

    Raises:
        CheckpointError: the counts differ.
    """
    found = {match.group(1) for name in source.shapes if (match := re.search(r"\b(?:layers|blk)\.(\d+)\.", name))}
    if len(found) != count:
        raise CheckpointError(f"{source.label}: {key} is {count}, but there are tensors of {len(found)} layers")


def assemble(source: TensorSource, layout: Layout, dtype: torch.dtype | None = None, progress: Progress | None = None) -> dict[str, Tensor]:
    """Read every parameter of a layout, one at a time.

    Args:
        source: where the tensors are; each must be used by the layout, and have the layout's shape.
        layout: what to read.
        dtype: element type of the result; None keeps the source's.
        progress: called after each parameter.

    Returns:
        Flat parameter name -> tensor. Decay rates are float32 in every dtype.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshaped, of an unsupported element type, or holds NaN or infinity.
    """
    _check(source, layout)
    common = dtype or _common_dtype(source, layout)
    tensors: dict[str, Tensor] = {}
    for done, (flat, parts) in enumerate(layout.items(), start=1):
        tensors[flat] = _read_parameter(source, parts, torch.float32 if is_float32_always(flat) else common)
        if progress is not None:
            progress(flat, done, len(layout))
    return tensors


def _read_parameter(source: TensorSource, parts: Parts, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape, dtype=dtype)
    for piece, memory in _split(out, parts):
        values = source.read(piece.name)
        memory.copy_(half_split(values, piece.interleaved_heads) if piece.interleaved_heads else values)
        if not torch.stack(torch.aminmax(memory)).isfinite().all():  # one pass, no temporary of the tensor's size
            found = f"NaN or infinity as {str(dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{source.place(piece.name)}: tensor {piece.name!r} holds {found}; fetch or write the file again")
    return out


def _split(parameter: Tensor, parts: Parts) -> list[tuple[Piece, Tensor]]:
    """Every piece with a view, in its shape, of its place in a contiguous parameter."""
    blocks = parameter.view(-1).split([math.prod(piece.shape) for piece in parts.pieces])
    return [(piece, block.view(piece.shape)) for piece, block in zip(parts.pieces, blocks, strict=True)]


def take_apart(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of `assemble`, for layouts that are not interleaved: source name -> a view of its parameter."""
    return {piece.name: view for flat, parts in layout.items() for piece, view in _split(tensors[flat].contiguous(), parts)}


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder a projection's rows, in each head, from interleaved rotary pairs (0 0' 1 1' ...) to half-split ones (0 1 ... 0' 1' ...)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _check(source: TensorSource, layout: Layout) -> None:
    pieces = [piece for parts in layout.values() for piece in parts.pieces]
    if missing := [piece for piece in pieces if piece.name not in source.shapes]:
        name, shape = missing[0].name, list(missing[0].shape)
        raise CheckpointError(f"{source.place(name)}: tensor {name!r} is missing ({len(missing)} in all); expected shape {shape}")
    known = {piece.name for piece in pieces}
    if unknown := [name for name in source.shapes if name not in known]:
        name, count = unknown[0], len(unknown)
        raise CheckpointError(
            f"{source.place(name)}: tensor {name!r} is unknown ({count} in all); wm-graph does not support models that have it"
        )
    for piece in pieces:
        if source.shapes[piece.name] != piece.shape:
            found = list(source.shapes[piece.name])
            raise CheckpointError(f"{source.place(piece.name)}: tensor {piece.name!r} has shape {found}, expected {list(piece.shape)}")
        if source.dtype(piece.name) not in DTYPES:
            kind = str(source.dtype(piece.name)).removeprefix("torch.")
            raise CheckpointError(f"{source.place(piece.name)}: tensor {piece.name!r} is {kind}; expected float32, float16 or bfloat16")


def _common_dtype(source: TensorSource, layout: Layout) -> torch.dtype:
    """The one type of a uniform source; else the matrices' type where it holds the vectors exactly (GGUF widens vectors); else float32."""
    pieces = [piece for flat, parts in layout.items() for piece in parts.pieces if not is_float32_always(flat)]
    matrix_dtypes = {source.dtype(piece.name) for piece in pieces if len(piece.shape) > 1}
    if len(matrix_dtypes) > 1:
        return torch.float32
    dtype = matrix_dtypes.pop()
    vectors = [piece.name for piece in pieces if len(piece.shape) == 1]
    values = (source.read(name) for name in vectors if source.dtype(name) != dtype)
    return dtype if all(torch.equal(value, value.to(dtype).to(value.dtype)) for value in values) else torch.float32
