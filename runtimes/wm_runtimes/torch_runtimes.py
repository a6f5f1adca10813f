"""Sessions that run the model's own PyTorch code on the bundle's weights: as it is, or through torch.compile. CPU; imports torch."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from wm_graph.errors import RuntimeUnavailableError
from wm_runtimes.bundle import Bundle
from wm_runtimes.session import Array, Session
from wm_runtimes.state_buffers import StateBuffers


def availability(runtime: str = "eager") -> str | None:
    """Why a runtime of this file cannot run here, or None."""
    if find_spec("torch") is None:
        return 'torch is not installed; install it with `pip install "wm-graph[export]"`'
    compiler = os.environ.get("CXX") or "g++"
    if runtime == "compiled" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, {compiler} is not on the path; install g++ or set CXX"
    return None


class EagerSession(Session):
    """A session that calls `wm_graph.forward` step by step, writing into its state.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.

    Raises:
        InputError: batch or capacity is out of range.
        CheckpointError: the bundle's weights do not fit its configuration.
        RuntimeUnavailableError: torch is not installed.
    """

    runtime = "eager"

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int = 1024) -> None:
        if reason := availability(self.runtime):
            raise RuntimeUnavailableError(f"{self.runtime}: {reason}")
        from wm_graph.checkpoints import load_tensors
        from wm_graph.params import params_from_flat

        super().__init__(bundle, batch, capacity)
        self._params: Any = params_from_flat(bundle.config, load_tensors(bundle.path))

    def placement(self) -> dict[str, list[str]]:
        """Everything runs in torch on the CPU."""
        self._check_open()
        return {"torch cpu": ["wm_graph.forward"]}

    def close(self) -> None:
        """Free the state and the model; later calls are refused."""
        super().close()
        self._params = None

    def _forward(self, tokens_BT: Any, state: Any, valid_B: Any, select_BS: Any) -> Any:
        """Logits; the state is written in place."""
        return _step(self.bundle.config, self._params, tokens_BT, state, valid_B, select_BS)

    def _run(self, buffers: StateBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        import torch

        state = self._state(buffers, start, len(position_B))
        with torch.inference_mode():
            state.position.copy_(torch.from_numpy(position_B))
            tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in (tokens_BT, valid_B, select_BS))
            tokens, valid, select = tensors
            logits: Array = self._forward(tokens, state, valid, select).float().numpy()
        return logits

    def _state(self, buffers: StateBuffers, start: int, batch: int) -> Any:
        """The rows of the buffers as the model's state: tensors over the same memory."""
        kept: dict[tuple[int, int], Any] = buffers.bindings.setdefault("torch", {})
        if (start, batch) not in kept:
            import torch

            from wm_graph.state import state_from_flat

            with torch.inference_mode():
                leaves = {"position": torch.zeros(batch, dtype=torch.int64)}
                for leaf in buffers.leaves:
                    leaves[leaf.name] = torch.from_numpy(buffers.arrays[leaf.name][start : start + batch])
                    if leaf.dtype == "bfloat16":
                        leaves[leaf.name] = leaves[leaf.name].view(torch.bfloat16)
                kept[start, batch] = state_from_flat(self.bundle.config, leaves)
        return kept[start, batch]


class CompiledSession(EagerSession):
    """The same through `torch.compile(fullgraph=True)`: at most two graphs, one for T = 1 and one for every longer T.

    Args:
        bundle: the bundle.
        batch: number of rows.
        capacity: most tokens per row.

    Raises:
        InputError: batch or capacity is out of range.
        CheckpointError: the bundle's weights do not fit its configuration.
        RuntimeUnavailableError: torch or a C++ compiler is missing.
    """

    runtime = "compiled"

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int = 1024) -> None:
        super().__init__(bundle, batch, capacity)
        import torch

        self._compiled: Callable[..., Any] = torch.compile(_step, fullgraph=True, dynamic=True)

    def placement(self) -> dict[str, list[str]]:
        """Everything runs in torch on the CPU, compiled by Inductor."""
        self._check_open()
        return {"torch cpu, inductor": ["wm_graph.forward"]}

    def _forward(self, tokens_BT: Any, state: Any, valid_B: Any, select_BS: Any) -> Any:
        return self._compiled(self.bundle.config, self._params, tokens_BT, state, valid_B, select_BS)


def _step(cfg: Any, params: Any, tokens_BT: Any, state: Any, valid_B: Any, select_BS: Any) -> Any:
    """`forward` with the state written in place; returns the logits alone, so that a compiled graph hands out no aliases."""
    from wm_graph.model import forward

    return forward(cfg, params, tokens_BT, state, valid_B, select_BS, in_place=True)[0]
