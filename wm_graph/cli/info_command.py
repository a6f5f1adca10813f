"""`wm info`."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wm_graph.cli.arguments import AsJson
from wm_graph.cli.checks import refuse_hugging_face
from wm_graph.cli.console import human_bytes, human_count, print_fields, print_json
from wm_graph.cli.presets_command import layer_summary

if TYPE_CHECKING:
    from wm_graph.config import ModelConfig

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def command(
    path: Annotated[str, typer.Argument(help="A checkpoint folder, a bundle or the name of a preset.")],
    capacity: Annotated[int, typer.Option(min=1, max=2**24, help="Tokens that a row can hold, for the size of the state.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint, a bundle or a preset."""
    facts = describe(path, capacity)
    if as_json:
        print_json(facts)
        return
    print_fields(_lines(facts))


def describe(path: str, capacity: int) -> dict[str, Any]:
    """What there is to know about a path or preset, as JSON values.

    Raises:
        WmError: it is damaged, or neither a folder nor a preset.
    """
    folder = Path(path)
    if (folder / "manifest.json").exists():
        return _describe_bundle(folder, capacity)
    if folder.is_dir():
        return _describe_checkpoint(folder, capacity)
    return _describe_preset(path, capacity)


def _describe_preset(name: str, capacity: int) -> dict[str, Any]:
    from wm_graph.errors import ConfigError
    from wm_graph.presets import PRESETS

    if name not in PRESETS:
        raise ConfigError(f"{name}: neither a folder nor a preset; `wm presets` lists the presets")
    return {"kind": "preset", **_model_facts(PRESETS[name], "float32", capacity), "files": {}}


def _describe_checkpoint(folder: Path, capacity: int) -> dict[str, Any]:
    from wm_graph.config import ModelConfig
    from wm_graph.errors import CheckpointError

    refuse_hugging_face(folder)
    file = folder / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: neither a checkpoint (config.json) nor a bundle (manifest.json)") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.reason})") from error
    facts = _model_facts(ModelConfig.from_json(text), _stored_dtype(folder), capacity)
    return {"kind": "checkpoint", "path": str(folder), **facts, "files": _sizes(folder)}


def _stored_dtype(folder: Path) -> str:
    """The dtype of the embedding in a checkpoint's weights, from the header alone."""
    from wm_graph.errors import CheckpointError

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no model.safetensors; is this a checkpoint folder?")
    for file in files:
        entry = _header(file).get("embedding")
        if isinstance(entry, dict):
            return _SAFETENSORS.get(str(entry.get("dtype")), str(entry.get("dtype")))
    raise CheckpointError(f"{files[0]}: no tensor 'embedding'; `wm import` reads models of other layouts")


def _header(file: Path) -> dict[str, Any]:
    from wm_graph.errors import BundleError, CheckpointError
    from wm_runtimes.file_checks import check_safetensors

    try:
        check_safetensors(file, str(file))
    except BundleError as error:
        raise CheckpointError(str(error)) from error
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header


def _describe_bundle(folder: Path, capacity: int) -> dict[str, Any]:
    from wm_runtimes import open_bundle

    bundle = open_bundle(folder)
    leaf_bytes = [math.prod(leaf.concrete_shape(1, capacity, bundle.config.keep_window)) * _ITEM_BYTES[leaf.dtype] for leaf in bundle.state]
    return {
        "kind": "bundle",
        "path": str(folder),
        **_model_facts(bundle.config, bundle.dtype, capacity),
        "state_bytes_per_row": sum(leaf_bytes),
        "opset": bundle.opset,
        "versions": dict(bundle.versions),
        "chat_template": bundle.chat_template is not None,
        "files": _sizes(folder),
    }


def _model_facts(cfg: "ModelConfig", dtype: str, capacity: int) -> dict[str, Any]:
    from wm_graph.shapes import count_parameters, state_leaves

    def item_bytes(kind: str) -> int:
        if kind in ("position", "slot_position"):
            return 8
        return _ITEM_BYTES[dtype] if kind in ("kv", "slot") else max(4, _ITEM_BYTES[dtype])

    state = sum(math.prod(leaf.concrete_shape(1, capacity, cfg.keep_window)) * item_bytes(leaf.kind) for leaf in state_leaves(cfg))
    facts = {"name": cfg.name, "parameters": count_parameters(cfg), "dtype": dtype}
    return {**facts, "capacity": capacity, "state_bytes_per_row": state, "config": cfg.to_dict()}


def _sizes(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def _widths(cfg: Mapping[str, Any], layers: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """The sizes that some layer of the model has."""
    mixers, feed_forwards = ({pair[place] for pair in layers} for place in (0, 1))
    yield f"model {cfg['d_model']}"
    if feed_forwards - {"none"}:
        yield f"hidden {cfg['d_ff']}"
    if any("attention" in mixer for mixer in mixers):
        yield f"{cfg['n_head']} heads ({cfg['n_kv_head']} key/value) of {cfg['head_dim']}"
    if mixers & {"ssd", "mamba2"}:
        yield f"{cfg['ssd_head']} scan heads of {cfg['ssd_head_dim']} with state {cfg['ssd_state']}"
    if "mamba1" in mixers:
        yield f"{cfg['mamba1_width']} channels with state {cfg['mamba1_state']}"


def _lines(facts: Mapping[str, Any]) -> dict[str, str]:
    cfg = facts["config"]
    layers = tuple((mixer, feed_forward) for mixer, feed_forward in cfg["layers"])
    lines = {
        facts["kind"]: facts.get("path", facts["name"]),
        "model": f"{facts['name']}, {human_count(facts['parameters'])} parameters ({facts['parameters']}), {facts['dtype']}",
        "layers": layer_summary(layers),
        "widths": ", ".join(_widths(cfg, layers)),
        "vocabulary": f"{cfg['vocab_size']} tokens, head {'tied to' if cfg['tie_embeddings'] else 'apart from'} the embedding",
        "state": f"{human_bytes(facts['state_bytes_per_row'])} per row at capacity {facts['capacity']}",
    }
    if facts["kind"] == "bundle":
        lines["chat template"] = "yes" if facts["chat_template"] else "no"
        lines["ONNX opset"] = str(facts["opset"])
        lines["made with"] = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines |= {name: human_bytes(size) for name, size in facts["files"].items()}
    return lines
