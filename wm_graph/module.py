"""The same model as nn.Modules, one per layer: what torch.export, FSDP2 and activation checkpointing work on. No behaviour of its own."""

from typing import Any

from torch import Tensor, nn

from wm_graph.blocks import layer
from wm_graph.config import ModelConfig
from wm_graph.context import Context
from wm_graph.model import run_model
from wm_graph.params import LayerParams, Params, map_tensors, named_tensors
from wm_graph.state import LayerState, State


class Branch(nn.Module):
    """Holds tensors as parameters under their dotted names."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        for path, tensor in named_tensors(node):
            owner: nn.Module = self
            *parents, leaf = path.split(".")
            for part in parents:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            owner.register_parameter(leaf, parameter)


class Layer(Branch):
    """One layer: the pure function `wm_graph.blocks.layer` over this module's parameters."""

    def __init__(self, cfg: ModelConfig, params: LayerParams, scope: str) -> None:
        super().__init__(params)
        self.cfg = cfg
        self.scope = scope
        self._structure = map_tensors(params, lambda _, tensor: tensor.detach().to("meta"))

    def forward(
        self, x_MD: Tensor, state: LayerState | None, context: Context, select_BS: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        """See `wm_graph.blocks.layer`."""
        params = map_tensors(self._structure, lambda path, _: self.get_parameter(path))
        return layer(self.cfg, params, x_MD, state, context, self.scope, select_BS)


class Model(nn.Module):
    """A whole model; parameters carry the flat names of a checkpoint and share memory with the `params` given."""

    def __init__(self, cfg: ModelConfig, params: Params) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Parameter(params.embedding)
        self.layers = nn.ModuleList(Layer(cfg, node, f"layers.{index}") for index, node in enumerate(params.layers))
        self.norm = nn.Parameter(params.norm)
        self.head = None if params.head is None else nn.Parameter(params.head)

    def forward(
        self, tokens_BT: Tensor, state: State | None = None, valid_B: Tensor | None = None, select_BS: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `wm_graph.model.forward`."""

        def run(
            index: int, x_MD: Tensor, layer_state: LayerState | None, context: Context, select_BS: Tensor | None
        ) -> tuple[Tensor, LayerState | None]:
            out: tuple[Tensor, LayerState | None] = self.layers[index](x_MD, layer_state, context, select_BS)
            return out

        head = self.embedding if self.head is None else self.head
        return run_model(self.cfg, (self.embedding, self.norm, head), run, tokens_BT, state, valid_B, select_BS)
