"""Bundles: everything a runtime needs in one folder, written atomically."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import save_file

from wm_export import native
from wm_export.golden import golden_data
from wm_export.linear_nodes import linear_uses
from wm_export.program import export_program, next_name
from wm_export.to_onnx import FILES, Graph, graphs_of, onnx_from_program
from wm_export.weights import write_weights
from wm_graph.checkpoints import WEIGHTS, load_checkpoint, load_tensors, new_folder, read_json
from wm_graph.config import ModelConfig
from wm_graph.config_checks import check_cache
from wm_graph.errors import BundleError, ExportError
from wm_graph.params import Params, cast_params, params_from_flat, params_to_flat
from wm_graph.shapes import LeafSpec, count_parameters, state_leaves
from wm_graph.state import leaf_dtype
from wm_graph.tolerances import MODEL_LIMITS
from wm_kernels.onnx_functions import OPSET

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = ("onnx", "native")
SCHEMA = 1
HEADER_LIMIT = 5_000_000
_FRESH, _STALE = ".new.", ".old."  # prefixes of what is about to replace parts of a bundle, and of what was
_NO_TOKENS: dict[str, Any] = {"bos": None, "eos": None, "pad": None, "stop": [], "add_bos": False}

Progress = Callable[[str, float], None]


def export_bundle(
    checkpoint: str | Path,
    bundle: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    dtype: str = "fp32",
    architectures: Sequence[int] = (),
    progress: Progress | None = None,
) -> None:
    """Make a bundle from a checkpoint folder, or nothing at all.

    Args:
        checkpoint: folder with config.json and model.safetensors, and optionally tokenizer.json and generation.json.
        bundle: the folder to make; must not exist, or be empty.
        targets: what to make; `onnx` is both ONNX files, `native` the kernels of the model's graph, compiled.
        dtype: `fp32`, `fp16` or `bf16`: the dtype of weights, caches and arithmetic.
        architectures: that `native` compiles for: 80 for sm_80, and so on.
        progress: called with a stage's name and the fraction done.

    Raises:
        ExportError: an unknown target, dtype or architecture, weights that are not finite in the export dtype, or no Triton for `native`.
        ConfigError: a model that allows no state, which a bundle carries: dynamic RoPE scaling without `rope_dynamic_cache`.
        CheckpointError: the checkpoint is damaged, or the bundle folder is taken.
    """
    tell = progress or (lambda stage, fraction: None)
    _check_options(targets, dtype, architectures)
    tell("reading the checkpoint", 0.0)
    cfg, params = load_checkpoint(checkpoint)
    check_cache(cfg)
    params = cast_params(params, DTYPES[dtype])
    _check_finite(cfg, params)
    with new_folder(Path(bundle)) as scratch:
        tell("writing weights", 0.1)
        write_weights(params_to_flat(cfg, params), scratch / WEIGHTS)
        extra = _copy_text(Path(checkpoint), scratch)
        tell("making golden data", 0.25)
        save_file(golden_data(cfg, params), scratch / "golden.safetensors")
        del params
        made = _write_targets(cfg, DTYPES[dtype], targets, architectures, scratch, tell)
        tell("writing the manifest", 0.95)
        manifest = _manifest(cfg, DTYPES[dtype], extra, scratch) | made
        (scratch / "manifest.json").write_text(_manifest_text(manifest))
    tell("done", 1.0)


def export_into(
    bundle: str | Path, *, targets: Sequence[str] = ("onnx",), architectures: Sequence[int] = (), progress: Progress | None = None
) -> None:
    """Make targets anew inside an existing bundle, from the weights it holds; its other artefacts stay.

    Raises:
        BundleError: this is no bundle.
        ExportError: an unknown target or architecture, or no Triton for `native`.
        ConfigError: as `export_bundle`.
    """
    bundle = Path(bundle)
    tell = progress or (lambda stage, fraction: None)
    manifest_file = bundle / "manifest.json"
    if not manifest_file.exists():
        raise BundleError(f"{bundle}: no manifest.json; make a bundle with `wm export DIR -o BUNDLE`")
    manifest = read_json(manifest_file)
    names = {str(kind).removeprefix("torch."): name for name, kind in DTYPES.items()}
    if manifest.get("schema") != SCHEMA or manifest.get("dtype") not in names:
        raise BundleError(f"{manifest_file}: not a schema {SCHEMA} manifest of this version; export the bundle again")
    dtype = names[manifest["dtype"]]
    _check_options(targets, dtype, architectures)
    cfg = ModelConfig.from_dict(manifest["config"])
    check_cache(cfg)
    _check_finite(cfg, params_from_flat(cfg, load_tensors(bundle)))
    _clear(bundle)
    try:
        # Beside the weights, which the checker of ONNX files follows no link to.
        manifest |= _write_targets(cfg, DTYPES[dtype], targets, architectures, bundle, tell, prefix=_FRESH)
        for made in sorted(bundle.glob(f"{_FRESH}*")):
            _replace(made, bundle / made.name.removeprefix(_FRESH))
        manifest |= {"files": _files(bundle), "versions": _versions()}
        fresh = bundle / f"{_FRESH}manifest.json"
        fresh.write_text(_manifest_text(manifest))
        os.replace(fresh, manifest_file)
    finally:
        _clear(bundle)
    tell("done", 1.0)


def _replace(made: Path, place: Path) -> None:
    """Move a file, or a folder, to where an older one may be."""
    if made.is_dir() and place.exists():
        os.rename(place, place.with_name(f"{_STALE}{place.name}"))
    os.replace(made, place)


def _clear(bundle: Path) -> None:
    """Remove what an export into the bundle left, or would leave."""
    for path in (*bundle.glob(f"{_FRESH}*"), *bundle.glob(f"{_STALE}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_targets(
    cfg: ModelConfig,
    dtype: torch.dtype,
    targets: Sequence[str],
    architectures: Sequence[int],
    folder: Path,
    tell: Progress,
    prefix: str = "",
) -> dict[str, Any]:
    """Write the artefacts of targets beside the weights; what the manifest says of them."""
    tell("exporting the graph", 0.4)
    program = export_program(cfg, dtype)
    made: dict[str, Any] = {}
    tell("exporting to ONNX", 0.45)
    graphs = onnx_from_program(program, folder / WEIGHTS, WEIGHTS, graphs_of(dtype) if "onnx" in targets else ("cuda",))
    if "native" in targets:
        uses = [*native.uses_of(program), *linear_uses(graphs["cuda"])]
        kernels = folder / f"{prefix}{native.FOLDER}"
        made["native"] = native.write_native(uses, architectures, kernels, lambda done: tell("compiling kernels", 0.6 + 0.3 * done))
    if "onnx" in targets:
        tell("writing ONNX files", 0.9)
        _write_onnx(graphs, folder, prefix)
    return made


def _check_options(targets: Sequence[str], dtype: str, architectures: Sequence[int]) -> None:
    if dtype not in DTYPES:
        raise ExportError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if not targets:
        raise ExportError(f"no target given; choose from {', '.join(TARGETS)}")
    for target in targets:
        if target not in TARGETS:
            raise ExportError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    if "native" in targets:
        native.check_architectures(architectures)
    elif architectures:
        raise ExportError("architectures are those of target native, which is not asked for; add it to --targets or leave out --sm")


def _check_finite(cfg: ModelConfig, params: Params) -> None:
    for name, tensor in params_to_flat(cfg, params).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"tensor {name!r} holds NaN or infinity in {tensor.dtype}; repair the checkpoint or export in fp32")


def _copy_text(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Copy the tokenizer; return what generation.json says about tokens and chat."""
    if (checkpoint / "tokenizer.json").exists():
        shutil.copyfile(checkpoint / "tokenizer.json", scratch / "tokenizer.json")
    if not (checkpoint / "generation.json").exists():
        return {"tokens": _NO_TOKENS, "chat_template": None}
    extra = read_json(checkpoint / "generation.json")
    return {"tokens": _NO_TOKENS | dict(extra.get("tokens") or {}), "chat_template": extra.get("chat_template")}


def _write_onnx(graphs: Mapping[Graph, onnx.ModelProto], folder: Path, prefix: str) -> None:
    """Write ONNX files beside the weights, and check them there: the checker follows no links to external data."""
    for graph, proto in graphs.items():
        data = proto.SerializeToString(deterministic=True)
        if len(data) > HEADER_LIMIT:
            raise ExportError(f"{FILES[graph]}: header of {len(data)} bytes, expected at most {HEADER_LIMIT}; a weight was stored inside")
        file = folder / f"{prefix}{FILES[graph]}"
        file.write_bytes(data)
        try:
            onnx.checker.check_model(str(file), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{FILES[graph]}: does not pass onnx.checker ({str(error).splitlines()[0]})") from error


def _manifest(cfg: ModelConfig, dtype: torch.dtype, extra: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": cfg.name,
        "config": cfg.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "opset": OPSET,
        "parameters": count_parameters(cfg),
        "state": [_leaf(spec, dtype) for spec in state_leaves(cfg)],
        "files": _files(folder),
        "versions": _versions(),
        "limits": {"max_position": cfg.max_position, "vocab_size": cfg.vocab_size},
        "budgets": _budgets(str(dtype).removeprefix("torch.")),
        **extra,
    }


def _budgets(dtype: str) -> dict[str, dict[str, float]]:
    """Runtime -> the limits of its logits, from the project's table."""
    limits = [limit for limit in MODEL_LIMITS if limit.dtype == dtype]
    return {limit.runtime: {"R": limit.R, "max_abs": limit.max_abs, "choice_rate": limit.choice_rate} for limit in limits}


def _manifest_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, allow_nan=False) + "\n"


def _leaf(spec: LeafSpec, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "name": spec.name,
        "output": next_name(spec.name),
        "kind": spec.kind,
        "dtype": str(leaf_dtype(spec.kind, dtype)).removeprefix("torch."),
        "shape": list(spec.shape),
        "reset": "-inf" if spec.reset == -math.inf else spec.reset,
        "alias": spec.kind != "position",
    }


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    inside = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "manifest.json"]
    files = [path for path in inside if path.is_file()] + [path for path in (folder / native.FOLDER).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size} for path in sorted(files)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("wm-graph", "torch", "triton", "onnx", "onnxscript", "onnx-ir"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
