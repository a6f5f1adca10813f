"""Which tensors of a source make each parameter, and the checked, tensor by tensor copy.

A layout names, for every flat parameter, the source tensors stacked along its rows. Sizes follow from ModelConfig alone, so a
source that does not fit is refused before anything is read.
"""

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

    def read(self, name: str) -> Tensor:
        """One tensor; raises CheckpointError when its data cannot be decoded."""


@dataclass(frozen=True)
class Piece:
    """One source tensor, as a block of rows of a parameter.

    Attributes:
        name: its name in the source.
        shape: its expected shape.
        interleaved_heads: heads whose rotary pairs lie next to each other in its rows; 0 where they are half-split already.
    """

    name: str
    shape: Shape
    interleaved_heads: int = 0


Layout = dict[str, tuple[Piece, ...]]


def make_layout(cfg: ModelConfig, names: Mapping[str, tuple[str, ...]], interleaved: bool = False) -> Layout:
    """The layout of a model.

    Args:
        cfg: sizes and options.
        names: parameter name with `#` for the layer -> source names with `#` for the layer, in row order.
        interleaved: queries and keys are stored for interleaved rotary embeddings.
    """
    width, kv_width = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
    rows = {"layers.#.mixer.qkv": (width, kv_width, kv_width), "layers.#.feed_forward.gate_up": (cfg.d_ff, cfg.d_ff)}
    heads = {"layers.#.mixer.qkv": (cfg.n_head, cfg.n_kv_head, 0)} if interleaved else {}
    layout: Layout = {}
    for flat, shape in parameter_shapes(cfg).items():
        found = re.search(r"\d+", flat)
        index = found.group() if found else ""
        key = flat.replace(index, "#", 1) if found else flat
        sources = names[key]
        layout[flat] = tuple(
            Piece(source.replace("#", index), (count, *shape[1:]), head)
            for source, count, head in zip(sources, rows.get(key, shape[:1]), heads.get(key, (0,) * len(sources)), strict=True)
        )
    return layout


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
    for done, (flat, pieces) in enumerate(layout.items(), start=1):
        tensors[flat] = _read_parameter(source, pieces, torch.float32 if is_float32_always(flat) else common)
        if progress is not None:
            progress(flat, done, len(layout))
    return tensors


def _read_parameter(source: TensorSource, pieces: tuple[Piece, ...], dtype: torch.dtype) -> Tensor:
    out = torch.empty((sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:]), dtype=dtype)
    start = 0
    for piece in pieces:
        rows = out[start : start + piece.shape[0]]
        values = source.read(piece.name)
        rows.copy_(half_split(values, piece.interleaved_heads) if piece.interleaved_heads else values)
        if not torch.stack(torch.aminmax(rows)).isfinite().all():  # one pass, no temporary of the tensor's size
            raise CheckpointError(f"{source.label}: tensor {piece.name!r} holds NaN or infinity as {str(dtype).removeprefix('torch.')}")
        start += piece.shape[0]
    return out


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder a projection's rows, in each head, from interleaved rotary pairs (0 0' 1 1' ...) to half-split ones (0 1 ... 0' 1' ...)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _check(source: TensorSource, layout: Layout) -> None:
    pieces = [piece for group in layout.values() for piece in group]
    if missing := [piece for piece in pieces if piece.name not in source.shapes]:
        raise CheckpointError(
            f"{source.label}: tensor {missing[0].name!r} is missing ({len(missing)} in all); expected shape {list(missing[0].shape)}"
        )
    known = {piece.name for piece in pieces}
    if unknown := [name for name in source.shapes if name not in known]:
        raise CheckpointError(
            f"{source.label}: tensor {unknown[0]!r} is unknown ({len(unknown)} in all); wm-graph does not support models that have it"
        )
    for piece in pieces:
        if source.shapes[piece.name] != piece.shape:
            raise CheckpointError(
                f"{source.label}: tensor {piece.name!r} has shape {list(source.shapes[piece.name])}, expected {list(piece.shape)}"
            )
        if source.dtype(piece.name) not in DTYPES:
            found = str(source.dtype(piece.name)).removeprefix("torch.")
            raise CheckpointError(f"{source.label}: tensor {piece.name!r} is {found}; expected float32, float16 or bfloat16")


def _common_dtype(source: TensorSource, layout: Layout) -> torch.dtype:
    """The one type of a uniform source; else the matrices' type where it holds the vectors exactly (GGUF widens vectors); else float32."""
    pieces = [piece for group in layout.values() for piece in group]
    matrix_dtypes = {source.dtype(piece.name) for piece in pieces if len(piece.shape) > 1}
    if len(matrix_dtypes) > 1:
        return torch.float32
    dtype = matrix_dtypes.pop()
    vectors = [piece.name for flat, group in layout.items() for piece in group if len(piece.shape) == 1 and not is_float32_always(flat)]
    values = (source.read(name) for name in vectors if source.dtype(name) != dtype)
    return dtype if all(torch.equal(value, value.to(dtype).to(value.dtype)) for value in values) else torch.float32
