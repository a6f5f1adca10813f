"""The header of a GGUF file: metadata and the place of every tensor, each read checked against the file's size.

The gguf package's own reader trusts counts and lengths, so a damaged file can hold it up for hours or end in any exception. Here every
length is checked before it is used. Block sizes and dequantisation come from the package.

Source:
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from wm_graph.errors import CheckpointError, RuntimeUnavailableError
from wm_graph.importers.fields import clip
from wm_graph.shapes import Shape

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file.

    Attributes:
        shape: row-major shape, the reverse of GGUF's own order.
        kind: name of the quantisation type, such as `Q4_1`.
        offset: first byte.
        size: number of bytes.
    """

    shape: Shape
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def load_gguf_package() -> ModuleType:
    """The `gguf` package, which only importing needs.

    Raises:
        RuntimeUnavailableError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise RuntimeUnavailableError('reading GGUF files needs the gguf package: pip install "wm-graph[import]"') from error
    module: ModuleType = gguf
    return module


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: not GGUF, truncated or damaged.
        RuntimeUnavailableError: the `gguf` package is not installed.
    """
    load_gguf_package()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(str(path), data))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read as GGUF ({clip(str(error))}); fetch it again") from error


class _Cursor:
    """A position in the file that never runs past its end."""

    def __init__(self, label: str, data: mmap.mmap) -> None:
        self.label = label
        self.data = data
        self.at = 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: GGUF file is truncated or damaged: {what}; fetch it again")

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise self.damaged(f"{what} needs {count} bytes at {self.at}, the file ends at {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind: str, what: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def integer(self, what: str, width: int = 8) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def text(self, what: str) -> str:
        raw = self.take(self.integer(f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is {clip(raw)}, expected UTF-8 text") from error


def _read(cursor: _Cursor) -> GgufHeader:
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise CheckpointError(f"{cursor.label}: not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    version = cursor.integer("the version", 4)
    if version not in (2, 3):
        kind = "big-endian" if version & 0xFFFF == 0 and version else f"version {version}"
        raise CheckpointError(f"{cursor.label}: GGUF file is {kind}; expected version 2 or 3, little-endian")
    tensor_count, key_count = cursor.integer("the tensor count"), cursor.integer("the key count")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key")
        if key in metadata:
            raise cursor.damaged(f"key {clip(key)} is there twice")
        metadata[key] = _read_value(cursor, cursor.integer(f"the type of {key}", 4), key)
    return GgufHeader(metadata, _read_tensors(cursor, tensor_count, metadata))


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(clip(key))
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind], clip(key))
    if kind != _ARRAY:
        raise cursor.damaged(f"{clip(key)} has value type {kind}, expected 0 to 12")
    item, count = cursor.integer(clip(key), 4), cursor.integer(clip(key))
    if item == _STRING:
        return [cursor.text(clip(key)) for _ in range(count)]
    if item not in _SCALARS:
        raise cursor.damaged(f"{clip(key)} is an array of value type {item}, expected numbers or texts")
    dtype = np.dtype(_SCALARS[item])
    return np.frombuffer(cursor.take(count * dtype.itemsize, clip(key)), dtype).tolist()


def _read_tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
    found: dict[str, tuple[Shape, int, int]] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name")
        if name in found:
            raise cursor.damaged(f"tensor {clip(name)} is there twice")
        n_dims = cursor.integer(f"the rank of {clip(name)}", 4)
        if not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.damaged(f"tensor {clip(name)} has {n_dims} dimensions, expected 1 to {_MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, clip(name)))
        kind = cursor.integer(clip(name), 4)
        found[name] = (dims[::-1], kind, cursor.integer(clip(name)))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{cursor.label}: general.alignment is {clip(alignment)}; expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    return {name: _place(cursor, name, shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}


def _place(cursor: _Cursor, name: str, shape: Shape, kind: int, offset: int) -> GgufTensor:
    package = load_gguf_package()
    try:
        quantisation = package.GGMLQuantizationType(kind)
        block, block_bytes = package.GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{cursor.label}: tensor {clip(name)} has type {kind}, which this gguf package does not know") from error
    if shape[-1] % block:
        raise cursor.damaged(f"tensor {clip(name)} has rows of {shape[-1]} values, {quantisation.name} has blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if offset + size > len(cursor.data):
        raise cursor.damaged(f"tensor {clip(name)} needs {size} bytes at {offset}, the file ends at {len(cursor.data)}")
    return GgufTensor(shape, quantisation.name, offset, size)
