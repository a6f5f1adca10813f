"""wm-graph: Cheems and the models it is compared with, written once as pure functions.

Names load on first use, so that importing `wm_graph.errors` or `wm_graph.config` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wm_graph.checkpoints import load_checkpoint, save_checkpoint
    from wm_graph.config import ModelConfig
    from wm_graph.model import forward
    from wm_graph.module import Model
    from wm_graph.params import Params, init_params
    from wm_graph.state import State, zero_state
    from wm_graph.upcycling import upcycle

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "Params": "params",
    "init_params": "params",
    "State": "state",
    "zero_state": "state",
    "forward": "model",
    "Model": "module",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
    "upcycle": "upcycling",
}

__all__ = [
    "Model",
    "ModelConfig",
    "Params",
    "State",
    "forward",
    "init_params",
    "load_checkpoint",
    "save_checkpoint",
    "upcycle",
    "zero_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wm_graph' has no attribute '{name}'")
    return getattr(import_module(f"wm_graph.{_HOME[name]}"), name)
