"""Opening a bundle: the manifest as frozen, typed data, and checks that name the file that is wrong. Needs no torch and no onnx."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from wm_graph.config import MAX_POSITION, ModelConfig
from wm_graph.config_checks import check_cache
from wm_graph.errors import BundleError, ConfigError
from wm_runtimes.file_checks import check_file, sha256_of

__all__ = ["Bundle", "FileEntry", "Limits", "StateLeaf", "TokenIds", "open_bundle", "sha256_of"]

SCHEMA = 1
DTYPES = ("float32", "float16", "bfloat16")
LEAF_DTYPES = (*DTYPES, "int64")
LEAF_KINDS = ("position", "ssm", "conv", "kv", "slot", "score", "slot_position")
SYMBOLS = ("batch", "capacity", "window")
_MAX_MANIFEST_BYTES = 16_000_000


@dataclass(frozen=True)
class StateLeaf:
    """One tensor of the decode state.

    Attributes:
        name: graph input that takes it.
        output: graph output that returns it.
        kind: one of `LEAF_KINDS`.
        dtype: one of `LEAF_DTYPES`.
        shape: numbers, `batch` (always axis 0), `capacity` or `window`.
        reset: value that an empty state holds.
        alias: whether one buffer may be bound to input and output.
    """

    name: str
    output: str
    kind: str
    dtype: str
    shape: tuple[int | str, ...]
    reset: float
    alias: bool

    def concrete_shape(self, batch: int, capacity: int, keep_window: int) -> tuple[int, ...]:
        """The shape with its symbols replaced."""
        sizes = {"batch": batch, "capacity": capacity, "window": min(keep_window, capacity)}
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (lower-case hexadecimal) and size in bytes of a file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Limits:
    """Most positions a row can hold, and the number of token ids."""

    max_position: int
    vocab_size: int


@dataclass(frozen=True)
class TokenIds:
    """Special token ids, ids that end a generation, and whether a text starts with `bos`."""

    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    add_bos: bool


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its manifest read and checked. Make it with `open_bundle`.

    Attributes:
        path: the bundle's folder.
        name: name of the model.
        config: the model's configuration.
        dtype: the weights' dtype.
        opset: ONNX opset of the graphs.
        parameters: number of parameters.
        state: leaves of the decode state, in graph order; the one named `position` counts tokens.
        files: path inside the bundle -> hash and size.
        versions: versions of what wrote the bundle.
        limits: limits of the model.
        budgets: runtime -> limits of its logits, as written at export.
        tokens: special tokens.
        chat_template: Jinja template, or None.
        manifest: the whole manifest as parsed JSON.
    """

    path: Path
    name: str
    config: ModelConfig
    dtype: str
    opset: int
    parameters: int
    state: tuple[StateLeaf, ...]
    files: Mapping[str, FileEntry]
    versions: Mapping[str, str]
    limits: Limits
    budgets: Mapping[str, Any]
    tokens: TokenIds
    chat_template: str | None
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Path of a file of the bundle.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.files:
            raise BundleError(
                f"{self.path}: the bundle has no {name}; it holds {', '.join(sorted(self.files))}; export it with that target"
            )
        return self.path / name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over configuration, dtype, state and the weights' hash: two bundles with the same one continue each other's state."""
        import hashlib

        weights = self.files["model.safetensors"].sha256
        parts = [self.config.to_dict(), self.dtype, self.manifest["state"], weights]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_bundle(path: str | os.PathLike[str], verify: bool = False) -> Bundle:
    """Read and check a bundle.

    Args:
        path: the bundle's folder.
        verify: also compare the SHA-256 of every file, which reads all of it.

    Raises:
        BundleError: the bundle is missing, damaged, or of another schema; one line names the file, what came and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; make one with `wm export CHECKPOINT -o {folder}`")
    manifest = _read_manifest(folder / "manifest.json")
    bundle = _parse(folder, manifest)
    for name, entry in bundle.files.items():
        _check_listed_file(folder, name, entry, verify)
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BundleError(f"{path}: no such file; {path.parent} is not a bundle, make one with `wm export`")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {path.stat().st_size} bytes, expected at most {_MAX_MANIFEST_BYTES}; this is no manifest")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BundleError(f"{path}: not valid JSON{where}; the bundle is damaged, export it again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(manifest).__name__}; export the bundle again")
    if manifest.get("schema") != SCHEMA or isinstance(manifest["schema"], bool):
        raise BundleError(
            f"{path}: schema {manifest.get('schema')!r}, this version reads schema {SCHEMA}; export the bundle with this version"
        )
    return manifest


class _Fields:
    """Typed look-up in a JSON object, with errors that say where in the manifest the value stands."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise BundleError(f"manifest.json: {where} is {_shown(values)}, expected an object; export the bundle again")
        self.values: dict[str, Any] = values

    def get(self, name: str, *types: type) -> Any:
        """The value of a field, whose type must be one of `types` (bool is no int)."""
        label = f"{self.where}.{name}" if self.where else name
        if name not in self.values:
            raise BundleError(f"manifest.json: field {label!r} is missing; export the bundle again")
        value = self.values[name]
        if type(value) not in types:
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise BundleError(f"manifest.json: {label} is {_shown(value)}, expected {expected}; export the bundle again")
        return value

    def count(self, name: str, least: int = 0) -> int:
        """An integer of at least `least`."""
        value: int = self.get(name, int)
        if value < least:
            raise BundleError(f"manifest.json: {self.where + '.' if self.where else ''}{name} is {value}, expected at least {least}")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parse(folder: Path, manifest: dict[str, Any]) -> Bundle:
    fields = _Fields(manifest, "")
    config = _parse_config(fields.get("config", dict))
    dtype = fields.get("dtype", str)
    if dtype not in DTYPES:
        raise BundleError(f"manifest.json: dtype is {_shown(dtype)}, expected one of {', '.join(DTYPES)}; export the bundle again")
    limits = _parse_limits(_Fields(fields.get("limits", dict), "limits"), config)
    versions = fields.get("versions", dict)
    return Bundle(
        path=folder,
        name=fields.get("name", str),
        config=config,
        dtype=dtype,
        opset=fields.count("opset", least=1),
        parameters=fields.count("parameters"),
        state=_parse_state(fields.get("state", list)),
        files=MappingProxyType(_parse_files(fields.get("files", dict))),
        versions=MappingProxyType({name: str(version) for name, version in versions.items()}),
        limits=limits,
        budgets=MappingProxyType(fields.get("budgets", dict)),
        tokens=_parse_tokens(_Fields(fields.get("tokens", dict), "tokens"), limits.vocab_size),
        chat_template=fields.get("chat_template", str, type(None)),
        manifest=MappingProxyType(manifest),
    )


def _parse_config(values: dict[str, Any]) -> ModelConfig:
    try:
        config = ModelConfig.from_dict(values)
        check_cache(config)
        return config
    except (ConfigError, TypeError) as error:
        raise BundleError(f"manifest.json: config: {error}") from error


def _parse_limits(fields: _Fields, config: ModelConfig) -> Limits:
    limits = Limits(fields.count("max_position", least=1), fields.count("vocab_size", least=1))
    if limits.vocab_size != config.vocab_size:
        raise BundleError(
            f"manifest.json: limits.vocab_size is {limits.vocab_size}, config.vocab_size is {config.vocab_size}; export again"
        )
    if limits.max_position > MAX_POSITION:
        raise BundleError(f"manifest.json: limits.max_position is {limits.max_position}, positions are exact up to {MAX_POSITION} only")
    return limits


def _parse_tokens(fields: _Fields, vocab_size: int) -> TokenIds:
    ids = {name: fields.get(name, int, type(None)) for name in ("bos", "eos", "pad")}
    stop = fields.get("stop", list)
    for token in (*ids.values(), *stop):
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise BundleError(f"manifest.json: tokens: id {_shown(token)} is outside 0..{vocab_size - 1}; export the bundle again")
    add_bos = fields.get("add_bos", bool)
    if add_bos and ids["bos"] is None:
        raise BundleError("manifest.json: tokens.add_bos is true but tokens.bos is null; export the bundle again")
    return TokenIds(ids["bos"], ids["eos"], ids["pad"], tuple(stop), add_bos)


def _parse_state(entries: list[Any]) -> tuple[StateLeaf, ...]:
    leaves = tuple(_parse_leaf(_Fields(entry, f"state[{index}]")) for index, entry in enumerate(entries))
    names = [name for leaf in leaves for name in (leaf.name, leaf.output)]
    if len(set(names)) != len(names):
        raise BundleError("manifest.json: state: two leaves share a name; export the bundle again")
    position = next((leaf for leaf in leaves if leaf.name == "position"), None)
    if position is None or position.dtype != "int64" or position.shape != ("batch",) or position.alias:
        raise BundleError("manifest.json: state: needs a leaf 'position', int64, shape ['batch'], not aliased; export the bundle again")
    return leaves


def _parse_leaf(fields: _Fields) -> StateLeaf:
    name, kind, dtype = fields.get("name", str), fields.get("kind", str), fields.get("dtype", str)
    if kind not in LEAF_KINDS:
        raise BundleError(f"manifest.json: state leaf {name!r} has kind {_shown(kind)}, expected one of {', '.join(LEAF_KINDS)}")
    if dtype not in LEAF_DTYPES:
        raise BundleError(f"manifest.json: state leaf {name!r} has dtype {_shown(dtype)}, expected one of {', '.join(LEAF_DTYPES)}")
    shape = fields.get("shape", list)
    known = [size in SYMBOLS if isinstance(size, str) else type(size) is int and size >= 1 for size in shape]
    if not all(known) or shape[:1] != ["batch"] or "batch" in shape[1:]:
        raise BundleError(
            f"manifest.json: state leaf {name!r} has shape {_shown(shape)}, expected 'batch', then numbers, 'capacity' or 'window'"
        )
    return StateLeaf(
        name, fields.get("output", str), kind, dtype, tuple(shape), _reset_value(fields, name, dtype), fields.get("alias", bool)
    )


def _reset_value(fields: _Fields, name: str, dtype: str) -> float:
    value = fields.get("reset", int, float, str)
    if value == "-inf" and dtype != "int64":
        return -math.inf
    if isinstance(value, str) or not math.isfinite(value):
        raise BundleError(f"manifest.json: state leaf {name!r} resets to {_shown(value)}, expected a number, or '-inf' for floats")
    return float(value)


def _parse_files(entries: dict[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, entry in entries.items():
        _check_name(name)
        fields = _Fields(entry, f"files[{name!r}]")
        digest = fields.get("sha256", str)
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise BundleError(f"manifest.json: files[{name!r}].sha256 is {_shown(digest)}, expected 64 lower-case hexadecimal digits")
        files[name] = FileEntry(digest, fields.count("size"))
    if "model.safetensors" not in files:
        raise BundleError("manifest.json: files lists no model.safetensors; export the bundle again")
    return files


def _check_name(name: str) -> None:
    """Refuse names that are not plain relative paths below the bundle, on any operating system."""
    pure = PurePosixPath(name)
    plain = name == str(pure) and not pure.is_absolute() and ".." not in pure.parts and name != "."
    if not plain or any(character in name for character in "\\:\0") or name == "manifest.json":
        raise BundleError(f"manifest.json: files lists {_shown(name)}, expected a plain path below the bundle; do not use this bundle")


def _check_listed_file(folder: Path, name: str, entry: FileEntry, verify: bool) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: a link that leaves the bundle; replace it by the file itself")
    if not path.is_file():
        raise BundleError(f"{path}: missing, manifest.json lists it; copy the whole bundle or export it again")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleError(f"{path}: {size} bytes, manifest.json says {entry.size}; copy it again or export the bundle again")
    check_file(path, str(path))
    if verify and (digest := sha256_of(path)) != entry.sha256:
        raise BundleError(f"{path}: SHA-256 {digest[:12]}..., manifest.json says {entry.sha256[:12]}...; copy it again or export again")
