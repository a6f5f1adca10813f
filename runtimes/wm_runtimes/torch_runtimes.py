"""Sessions that run the model's own PyTorch code on the bundle's weights: as it is, or through torch.compile. CPU; imports torch."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np

from wm_graph.config import ModelConfig
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
            # Copies, because numpy's strides of axes of size 1 are arbitrary and torch.compile would look at them.
            tokens, valid, select = (torch.tensor(array) for array in (tokens_BT, valid_B, select_BS))
            logits_BSV: Array = self._forward(tokens, state, valid, select).float().numpy()
        return logits_BSV

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
        # torch.compile makes a size of 1 its own graph. A session of several rows therefore never runs a single one.
        self._pair: Any = self._make_buffers(2) if self.batch > 1 else None
        self._compiled = _compiled_step(bundle.config, bundle.dtype, self.batch == 1)

    def placement(self) -> dict[str, list[str]]:
        """Everything runs in torch on the CPU, compiled by Inductor."""
        self._check_open()
        return {"torch cpu, inductor": ["wm_graph.forward"]}

    def close(self) -> None:
        """Free the state and the model; later calls are refused."""
        super().close()
        self._pair = None

    def _run(self, buffers: StateBuffers, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        length, selected = tokens_BT.shape[1], select_BS.shape[1]
        # For the same reason S is 1 exactly where T is: one token has one index to select, and with more a second column does no harm.
        width = 1 if length == 1 else max(selected, 2)
        select_BW = np.pad(select_BS[:, :width], ((0, 0), (0, max(width - selected, 0))), mode="edge")
        arguments = (position_B, tokens_BT, valid_B, select_BW)
        if self._pair is None or len(position_B) > 1:
            logits_BWV = super()._run(buffers, start, *arguments)
        else:
            twice = np.array([start, start])
            self._pair.gather(buffers, twice)
            logits_BWV = super()._run(self._pair, 0, *(np.repeat(array, 2, axis=0) for array in arguments))[:1]
            self._pair.scatter(buffers, twice)
        if width < selected:
            return np.repeat(logits_BWV, selected, axis=1)
        return logits_BWV[:, :selected]

    def _forward(self, tokens_BT: Any, state: Any, valid_B: Any, select_BS: Any) -> Any:
        for tensor in (tokens_BT, valid_B, select_BS):
            _mark_dynamic(tensor, *range(tensor.ndim))
        return self._compiled(self.bundle.config, self._params, tokens_BT, state, valid_B, select_BS)

    def _state(self, buffers: StateBuffers, start: int, batch: int) -> Any:
        state = super()._state(buffers, start, batch)
        _mark_dynamic(state.position, 0)
        for layer in state.layers:
            for name, leaf in vars(layer).items():
                # Axis 2 of a cache or window is its length; the states of scans and convolutions have no such axis.
                _mark_dynamic(leaf, 0, *(() if name in ("ssd", "scan", "conv") else (2,)))
        return state


def _mark_dynamic(tensor: Any, *axes: int) -> None:
    """Tell the compiler which sizes vary, so that it keeps the model's own widths constant; a size of 1 is a graph of its own anyway."""
    import torch

    for axis in axes:
        if tensor.shape[axis] != 1:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)


@cache
def _compiled_step(config: ModelConfig, dtype: str, single: bool) -> Callable[..., Any]:
    """The compiled step, shared by every session whose graphs are the same."""
    import torch

    # Dynamo counts recompilations per code object, so that different models need one each.
    step = FunctionType(_step.__code__.replace(), globals())
    return torch.compile(step, fullgraph=True)


def _step(cfg: Any, params: Any, tokens_BT: Any, state: Any, valid_B: Any, select_BS: Any) -> Any:
    """`forward` with the state written in place; returns the logits alone, so that a compiled graph hands out no aliases."""
    from wm_graph.model import forward

    return forward(cfg, params, tokens_BT, state, valid_B, select_BS, in_place=True)[0]
