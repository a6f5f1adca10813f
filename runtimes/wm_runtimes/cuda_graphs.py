"""Decode steps of ONNX Runtime as CUDA graphs: captured from a copy of the state, and used only if a replay gives the bits of a plain run.

ONNX Runtime runs a graph several times to capture it, each of which moves a state that is updated in place; and what it computes on the
host, or reads from there, is frozen in the graph. So the state is put back after capture, the capture is made with other inputs than the
replay, and the replay is compared with a plain run, bit by bit.
"""

import threading
from typing import Any

import numpy as np

from wm_runtimes.device_buffers import DeviceBuffers
from wm_runtimes.session import Array, first_line

_PLAIN = "-1"  # ONNX Runtime's number for: neither capture nor replay
_MOST = 16  # graphs of a session; each keeps its kernel nodes and arguments


class CapturedSteps:
    """The captured steps of a session.

    Args:
        wanted: whether to capture at all.

    Attributes:
        wanted: whether steps are captured from now on.
        reason: why some are not; empty where none was refused.
        captured: steps that were captured and proven.
        replays: steps that were replayed.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.reason = "" if wanted else "not asked for"
        self.captured = 0
        self.replays = 0
        self._enabled = wanted
        self._tried = 0
        self._options: dict[str, Any] = {}

    def refuse(self, reason: str) -> None:
        """Capture no more, before the model is opened: it is then opened without graphs."""
        self.wanted = self._enabled = False
        self.reason = " ".join(reason.split())

    def run_plainly(self, model: Any, binding: Any) -> None:
        """Launch node by node."""
        self._run(model, binding, _PLAIN)

    def run(self, model: Any, binding: Any, buffers: DeviceBuffers, capacity: int) -> None:
        """One step: replayed where it was captured; captured and proven when it first runs.

        Args:
            model: the `InferenceSession`.
            binding: a step whose inputs are uploaded.
            buffers: the state that it works on.
            capacity: most tokens per row.
        """
        graphs: dict[int, str | None] = binding.graphs
        thread = threading.get_ident()  # graphs belong to the thread that captured them
        if thread not in graphs:
            graphs[thread] = None
            if self.wanted and self._tried < _MOST:
                graphs[thread] = self._captured(model, binding, buffers, capacity)
                return
            if self.wanted:
                self.reason = f"{_MOST} graphs are captured already; open another session"
        if (graph := graphs[thread]) is None:
            self.run_plainly(model, binding)
        else:
            self._run(model, binding, graph)
            self.replays += 1

    def _captured(self, model: Any, binding: Any, buffers: DeviceBuffers, capacity: int) -> str | None:
        """Capture a step, prove it and leave the state after the step; its number, or None where only the plain run can be used."""
        start, count = binding.rows
        before = buffers.save(start, count)
        self.run_plainly(model, binding)
        logits, after = _bits(binding), buffers.save(start, count)
        self._tried += 1
        graph = str(self._tried)
        try:
            buffers.load(start, before)
            self._capture_other(model, binding, graph, capacity)
            buffers.load(start, before)
            self._run(model, binding, graph)
            replayed, moved = _bits(binding), buffers.save(start, count)
        except Exception as error:  # ONNX Runtime's own classes have no public common base
            self.reason = f"capturing a step failed: {first_line(error)}"
        else:
            wrong = [name for name in after if not np.array_equal(after[name].view(np.uint8), moved[name].view(np.uint8))]
            if np.array_equal(logits, replayed) and not wrong:
                self.captured += 1
                return graph
            self.reason = f"a captured step differs from a plain one in {', '.join(wrong[:3]) or 'the logits'}"
        self.wanted = False
        buffers.load(start, before)
        self.run_plainly(model, binding)
        return None

    def _capture_other(self, model: Any, binding: Any, graph: str, capacity: int) -> None:
        """Capture with another token at another position, then upload the step's own inputs again."""
        own = {name: part.copy() for name, part in binding.parts.items()}
        binding.parts["tokens"][...] = np.where(own["tokens"] > 0, own["tokens"] - 1, own["tokens"] + 1)
        binding.parts["position"][...] = (own["position"] + 1) % capacity
        binding.inputs.update_inplace(binding.host)
        self._run(model, binding, graph)
        for name, part in own.items():
            binding.parts[name][...] = part
        binding.inputs.update_inplace(binding.host)

    def _run(self, model: Any, binding: Any, graph: str) -> None:
        if not self._enabled:
            model.run_with_iobinding(binding.io)
            return
        if graph not in self._options:
            import onnxruntime

            self._options[graph] = onnxruntime.RunOptions()
            self._options[graph].add_run_config_entry("gpu_graph_id", graph)
        model.run_with_iobinding(binding.io, self._options[graph])


def _bits(binding: Any) -> Array:
    return np.array(binding.logits_BSV.numpy()).view(np.uint8)
