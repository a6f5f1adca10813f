"""Cheap plausibility checks of a bundle's files: they read headers, never weights, and need no torch and no onnx."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from wm_graph.errors import BundleError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_GRAPH_FIELD = 7  # of ModelProto
_FIXED_BYTES = {1: 8, 5: 4}  # protobuf wire type -> payload


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file in lower-case hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, name: str) -> None:
    """Check that a file looks like what its name says; files of other kinds pass.

    Raises:
        BundleError: it does not.
    """
    if name.endswith(".safetensors"):
        check_safetensors(path, name)
    elif name.endswith(".onnx"):
        check_onnx(path, name)


def check_safetensors(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Check the header of a safetensors file: its length, its JSON, and that every tensor lies inside the file.

    Returns:
        Tensor name -> shape.

    Raises:
        BundleError: the header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise BundleError(f"{name}: header length {length} does not fit a file of {size} bytes; the file is damaged, export it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name}: the safetensors header is not valid JSON; the file is damaged, export it again") from error
    if not isinstance(header, dict):
        raise BundleError(f"{name}: the safetensors header is {type(header).__name__}, expected an object; export the bundle again")
    for tensor, entry in header.items():
        if tensor != "__metadata__" and not _plausible_tensor(entry, size - 8 - length):
            raise BundleError(f"{name}: tensor {tensor!r} has a damaged header entry (dtype, shape or offsets); export the bundle again")
    return {tensor: tuple(entry["shape"]) for tensor, entry in header.items() if tensor != "__metadata__"}


def _plausible_tensor(entry: Any, data_bytes: int) -> bool:
    """Whether a header entry names a known dtype and offsets inside the data that match the shape."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in ITEM_BYTES:
        return False
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        return False
    start, end = offsets
    return bool(start <= end <= data_bytes and end - start == math.prod(shape) * ITEM_BYTES[entry["dtype"]])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def check_onnx(path: Path, name: str) -> None:
    """Walk the outermost protobuf fields of an ONNX file: they must end where the file ends, and hold a graph.

    Raises:
        BundleError: the file is no ONNX model, or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        fields = _field_numbers(file, size)
    if fields is None or _GRAPH_FIELD not in fields:
        raise BundleError(f"{name}: not an ONNX model ({size} bytes), the protobuf is damaged; export the bundle again")


def _field_numbers(file: BinaryIO, size: int) -> set[int] | None:
    """Numbers of the outermost fields, or None when the fields do not fit the file."""
    numbers = set()
    while file.tell() < size:
        tag = _varint(file)
        if tag is None:
            return None
        wire_type = tag & 7
        if wire_type in (0, 2):
            value = _varint(file)
            skip = value if wire_type == 2 else 0
        else:
            value = skip = _FIXED_BYTES.get(wire_type)
        if value is None or skip is None or file.tell() + skip > size:
            return None
        file.seek(skip, os.SEEK_CUR)
        numbers.add(tag >> 3)
    return numbers


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
