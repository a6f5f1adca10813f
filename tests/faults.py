"""Faults that tests plant: in a copy of a bundle, or in an op of the torch runtimes for a while."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import torch
from safetensors.torch import load_file
from torch import Tensor

import wm_kernels
from wm_export.weights import write_weights
from wm_runtimes import sha256_of

Edit = Callable[[Path], None]
Override = Callable[[], AbstractContextManager[None]]
Wrong = Callable[..., Any]  # (what is right, *its arguments) -> the wrong result


@dataclass(frozen=True)
class Fault:
    """One mistake in one op of one runtime; `fault_catalogue.FAULTS` lists them.

    Attributes:
        name: the mistake.
        op: the op that is wrong, a key of `wm_graph.taps.OP_OUTPUTS`, or "model" for what lies between ops.
        family: the model that shows it, a key of `fault_catalogue.CONFIGS`.
        runtime: the runtime that is wrong.
        plant: what `planted` does: with `graph` it changes a copy of the bundle, without it makes the runtime wrong while it lasts.
        graph: the ONNX file that is wrong; empty for torch runtimes.
        dtype: of the bundle, "fp32", "fp16" or "bf16".
        shows: where alone it shows: "decode" (single tokens), "padding" (rows of unequal length), "window" (rows longer than the window),
            "float16" (a float32 file has nothing of the kind), "pieces" (several tokens after others), "far" (positions from 256 on),
            "choices" (the values are those of the choices made);
            "everywhere" otherwise.
    """

    name: str
    op: str
    family: str
    runtime: str
    plant: Edit | Override = field(repr=False)
    graph: str = ""
    dtype: str = "fp32"
    shows: str = "everywhere"

    @property
    def id(self) -> str:
        """A name of its own, for tests and messages."""
        return f"{self.graph or self.runtime}, {self.dtype}, {self.op}: {self.name}"

    @property
    def options(self) -> dict[str, Any]:
        """What a session of the runtime is opened with."""
        return {"graph": self.graph, "threads": 1} if self.graph else {}

    @contextmanager
    def planted(self, bundle: Path, scratch: Path) -> Iterator[Path]:
        """For a while, a bundle whose `runtime` is wrong: a changed copy in `scratch`, or `bundle` itself."""
        if self.graph:
            copy = Path(shutil.copytree(bundle, scratch / "faulty"))
            self.plant(copy)  # type: ignore[call-arg]
            yield copy
        else:
            with self.plant():  # type: ignore[call-arg, union-attr]
                yield bundle


# Torch: an op, or a function between ops, that is wrong while a context lasts. The oracle computes in float64, where all stays right.


@contextmanager
def wrong_op(op: str, wrong: Wrong, in_place_only: bool = True) -> Iterator[None]:
    """The kernels of an op return `wrong(right, *args)`, `right` being the functional op; of an op with a state, those in place alone.

    Sessions call those, and parity's yardstick the functional ones. The kernels are exchanged behind the op, so that compiled graphs call
    the wrong ones too, and runs that record an op's outputs record the wrong ones.
    """
    functional, in_place = getattr(wm_kernels, op), getattr(wm_kernels, f"{op}_", None)
    sick = _but_in_float64(functional._init_fn, wrong)
    with ExitStack() as stack:
        if in_place is not None:
            stack.enter_context(_kernel(in_place, _writes_back(in_place, sick)))
        if in_place is None or not in_place_only:
            stack.enter_context(_kernel(functional, sick))
        yield


@contextmanager
def wrong_function(module: str, name: str, wrong: Wrong) -> Iterator[None]:
    """A function of a module of the project returns `wrong(right, *args)`."""
    # Not by attributes: wm_kernels.rope is the op, not the package.
    found = importlib.import_module(module)
    with patch.object(found, name, _but_in_float64(getattr(found, name), wrong)):
        yield


@contextmanager
def _kernel(op: Any, run: Callable[..., Any]) -> Iterator[None]:
    with patch.object(op, "_init_fn", run), patch.dict(op._backend_fns, {None: run}):
        yield


def _but_in_float64(right: Callable[..., Any], wrong: Wrong) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if any(value.dtype == torch.float64 for value in _tensors(args)):
            return right(*args, **options)
        return wrong(right, *args, **options)

    return run


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _writes_back(in_place: Any, functional: Callable[..., Any]) -> Callable[..., Any]:
    """The in-place form of a functional op: the new states are copied into the arguments that it may write to."""
    arguments = in_place._opoverload._schema.arguments
    states = [index for index, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write]

    def run(*args: Any) -> Any:
        out, *new = functional(*args)
        for index, state in zip(states, new, strict=True):
            args[index].copy_(state)
        return out

    return run


# Bundles: files that are changed.


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
