"""The exported program: one graph for prefill and decode over flat, named tensors.

Parameters and example inputs live on the meta device: exporting touches no weight and costs the same memory for every size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from wm_graph.config import ModelConfig
from wm_graph.module import Model
from wm_graph.params import Params, is_float32_always, params_from_flat
from wm_graph.shapes import parameter_shapes, state_leaves
from wm_graph.state import leaf_dtype, state_from_flat, state_to_flat

# Example sizes: no two alike and none 1, so that torch.export ties no two dimensions together and specialises none.
_SYMBOLS = {"batch": 2, "tokens": 3, "select": 4, "capacity": 24, "window": 22}


@dataclass(frozen=True)
class Program:
    """An exported program and the names of its flat inputs and outputs, in order."""

    exported: ExportedProgram
    inputs: list[str]
    outputs: list[str]


class FlatModel(nn.Module):
    """`Model` behind flat tensors: tokens, valid, select, state leaves -> logits, state leaves."""

    def __init__(self, cfg: ModelConfig, model: Model) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = model

    def forward(self, tokens: Tensor, valid: Tensor, select: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `wm_graph.model.forward`; `leaves` are in the order of `state_leaves`."""
        names = [spec.name for spec in state_leaves(self.cfg)]
        state = state_from_flat(self.cfg, dict(zip(names, leaves, strict=True)))
        logits_BSV, state_after = self.model(tokens, state, valid, select)
        return logits_BSV, *state_to_flat(self.cfg, state_after).values()


def next_name(leaf: str) -> str:
    """The output name of a state leaf."""
    return f"{leaf}.next"


def export_program(cfg: ModelConfig, dtype: torch.dtype) -> Program:
    """torch.export the model with batch, tokens, select, capacity and window dynamic from 1.

    Args:
        cfg: the model.
        dtype: dtype of parameters and key/value caches.
    """
    specs = state_leaves(cfg)
    model = FlatModel(cfg, Model(cfg, _meta_params(cfg, dtype))).eval().requires_grad_(False)
    dims = {name: Dim(name, min=1) for name in _SYMBOLS}

    def example(shape: tuple[int | str, ...], kind: torch.dtype) -> Tensor:
        return torch.empty([_SYMBOLS[size] if isinstance(size, str) else size for size in shape], dtype=kind, device="meta")

    def dynamic(shape: tuple[int | str, ...]) -> dict[int, Dim]:
        return {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}

    shapes: dict[str, tuple[int | str, ...]] = {"tokens": ("batch", "tokens"), "valid": ("batch",), "select": ("batch", "select")}
    args = (
        *(example(shape, torch.int64) for shape in shapes.values()),
        tuple(example(spec.shape, leaf_dtype(spec.kind, dtype)) for spec in specs),
    )
    dynamic_shapes = {name: dynamic(shape) for name, shape in shapes.items()} | {"leaves": tuple(dynamic(spec.shape) for spec in specs)}
    with torch.no_grad():
        exported = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
    return Program(exported, [*shapes, *(spec.name for spec in specs)], ["logits", *(next_name(spec.name) for spec in specs)])


def _meta_params(cfg: ModelConfig, dtype: torch.dtype) -> Params:
    def empty(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32 if is_float32_always(name) else dtype, device="meta")

    return params_from_flat(cfg, {name: empty(name, shape) for name, shape in parameter_shapes(cfg).items()})
