"""Faults that tests plant in a copy of a bundle."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from safetensors.torch import load_file

from wm_export.weights import write_weights
from wm_runtimes import sha256_of


def resign(folder: Path, *names: str) -> None:
    """Make the manifest agree with changed files, so that only the numbers can tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in names:
        manifest["files"][name] = {"sha256": sha256_of(folder / name), "size": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def one_percent_off(weight: torch.Tensor) -> torch.Tensor:
    return weight * 1.01


def noisy(weight: torch.Tensor, share: float = 0.02) -> torch.Tensor:
    return weight + share * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def onnx_reads_another_weight(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The ONNX graphs read other weights than the oracle, from a copy with one tensor changed."""
    weights = load_file(folder / "model.safetensors")
    write_weights({**weights, name: change(weights[name])}, folder / "other.safetensors")
    for graph in ("model.onnx", "model.ort.onnx"):
        model = onnx.load(str(folder / graph), load_external_data=False)
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                if entry.key == "location":
                    entry.value = "other.safetensors"
        (folder / graph).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["other.safetensors"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    resign(folder, "other.safetensors", "model.onnx", "model.ort.onnx")
