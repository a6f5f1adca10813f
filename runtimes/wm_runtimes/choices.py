"""Runs that tell their choices: the model's taps, recorded ops of a torch session, promoted graph outputs under ONNX Runtime.

B rows, T tokens, S selected tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import wm_kernels
from wm_graph.config import ModelConfig
from wm_graph.errors import BundleError
from wm_graph.model import forward
from wm_graph.params import Params
from wm_graph.state import State, zero_state
from wm_graph.taps import Taps
from wm_runtimes.bundle import Bundle
from wm_runtimes.choice_names import op_of, selecting_calls
from wm_runtimes.draws import Array, Choices, Draws, SessionRunner, Trace, run_draws
from wm_runtimes.session import Session
from wm_runtimes.state_buffers import StateBuffers


class EagerRunner:
    """`forward` with functional state and taps: the yardstick.

    Args:
        cfg: the model.
        params: its parameters, in the dtype to run at.
        capacity: most tokens per row.
        names: taps to tell.
    """

    def __init__(self, cfg: ModelConfig, params: Params, capacity: int, names: Iterable[str]) -> None:
        self._cfg, self._params, self._capacity = cfg, params, capacity
        self._state: State | None = None
        self._wanted = frozenset(names)

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        self._state = zero_state(self._cfg, len(tokens_BT), self._capacity, self._params.norm.dtype)
        return self._run(tokens_BT, valid_B, select_BS)

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        rows = len(tokens_B)
        logits_B1V, choices = self._run(tokens_B[:, None], np.ones(rows, np.int64), np.zeros((rows, 1), np.int64))
        return logits_B1V[:, 0], choices

    def _run(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        tokens, valid, select = (torch.from_numpy(np.ascontiguousarray(array)) for array in (tokens_BT, valid_B, select_BS))
        taps = Taps(only=self._wanted.__contains__)
        with torch.no_grad():
            logits, self._state = forward(self._cfg, self._params, tokens, self._state, valid, select, taps=taps)
        return logits.numpy(), {name: value.numpy() for name, value in taps.values.items()}


class RecordingRunner:
    """A session of a torch runtime, compiled or not, whose selecting ops are recorded as they run.

    Ops are opaque to the compiler and run in the order of the layers, so that the n-th call of an op is the n-th of `selecting_calls`.

    Args:
        session: the session.
        names: taps to tell.
    """

    def __init__(self, session: Session, names: Iterable[str]) -> None:
        self._inner = SessionRunner(session)
        self._names = frozenset(names)
        self._calls: dict[str, list[str]] = {}
        for name in selecting_calls(session.bundle.config):
            self._calls.setdefault(op_of(name), []).append(name)
        self._seen: dict[str, list[Array]] = {}

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BSV, _ = self._inner.prefill(tokens_BT, valid_B, select_BS)
        return logits_BSV, self._choices()

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BV, _ = self._inner.decode(tokens_B)
        return logits_BV, self._choices()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For a while, CPU kernels that call the ops' own and keep what they chose, or chose by."""

        def picks(op: Any, *args: Any) -> Any:
            out = op._init_fn(*args)
            self._seen.setdefault(op._name, []).append(out[1].numpy().copy())
            return out

        def scores(op: Any, *args: Any) -> Any:
            self._seen.setdefault(op._name.removesuffix("_"), []).append(args[3].numpy().copy())
            return op._init_fn(*args)

        with torch.library._scoped_library("wm", "IMPL") as library:
            for op in (wm_kernels.product_key_topk, wm_kernels.router_topk):
                library.impl(op._name, partial(picks, op), "CPU")
            for op in (wm_kernels.keep_window_attention_, wm_kernels.scored_attention_):
                library.impl(op._name, partial(scores, op), "CPU")
            yield

    def _choices(self) -> Choices:
        """Tap name -> value recorded in the last call, for the names asked for."""
        found: dict[str, Array] = {}
        for op, values in self._seen.items():
            found |= zip(self._calls[op], values, strict=True)
        self._seen = {}
        return {name: value for name, value in found.items() if name in self._names}


class OnnxRunner:
    """An ONNX graph of the bundle in ONNX Runtime, with functional state and the named values as further outputs.

    Args:
        bundle: the bundle.
        batch: rows.
        capacity: most tokens per row.
        names: taps to tell; they are value names of the graph, except `*.score_in`, which is the score input of its node.
        graph: which of the bundle's graphs.
    """

    def __init__(self, bundle: Bundle, batch: int, capacity: int, names: Iterable[str], graph: str = "model.ort.onnx") -> None:
        import onnxruntime

        self._bundle, self._batch, self._capacity = bundle, batch, capacity
        self._feeds: dict[str, Array] = {}
        data, self._values = _promoted(bundle, graph, names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # The same as the session's, so that both round alike.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        self._model = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        buffers = StateBuffers(self._bundle.state, self._batch, self._capacity, self._bundle.config.keep_window)
        self._feeds = {"position": np.zeros(self._batch, np.int64), **buffers.arrays}
        return self._run(tokens_BT, valid_B, select_BS)

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_B1V, choices = self._run(tokens_B[:, None], np.ones(self._batch, np.int64), np.zeros((self._batch, 1), np.int64))
        return logits_B1V[:, 0], choices

    def _run(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        outputs = {"logits": "logits"} | {leaf.name: leaf.output for leaf in self._bundle.state} | self._values
        feeds = {"tokens": tokens_BT, "valid": valid_B, "select": select_BS, **self._feeds}
        wanted = list(dict.fromkeys(outputs.values()))
        found = dict(zip(wanted, self._model.run(wanted, feeds), strict=True))
        self._feeds = {leaf.name: found[leaf.output] for leaf in self._bundle.state}
        return found["logits"].astype(np.float32), {name: found[value] for name, value in self._values.items()}


def _promoted(bundle: Bundle, graph: str, names: Iterable[str]) -> tuple[bytes, dict[str, str]]:
    """A copy of the header, in memory, with the named values as further graph outputs; and tap name -> value name."""
    import onnx

    model = onnx.load(str(bundle.file(graph)), load_external_data=False)
    makers = {output: node for node in model.graph.node for output in node.output}
    values: dict[str, str] = {}
    for name in names:
        output = f"{name.removesuffix('score_in')}out" if name.endswith(".score_in") else name
        if output not in makers:
            raise BundleError(f"{bundle.path / graph}: no value named {output!r}; export the bundle again with this version")
        # The fourth input of attention with scores is the score; see docs/design.md.
        values[name] = makers[output].input[3] if name.endswith(".score_in") else name
    known = {value.name for value in model.graph.output}
    for name, value in values.items():
        if value not in known:
            known.add(value)
            kind = onnx.TensorProto.INT64 if name.endswith(".expert") else onnx.TensorProto.FLOAT
            model.graph.output.append(onnx.helper.make_tensor_value_info(value, kind, None))
    return model.SerializeToString(), values


class TellingSession:
    """A session whose answer to draws tells the choices it made.

    Args:
        session: the session.
        names: taps to tell, `choice_names`; none makes this a plain run.
        options: what the session was opened with.
    """

    def __init__(self, session: Session, names: Iterable[str], options: Mapping[str, Any]) -> None:
        self._session, self._names = session, tuple(names)
        self._onnx: OnnxRunner | None = None
        if self._names and session.runtime == "onnxruntime-cpu":
            graph = options.get("graph", "model.ort.onnx")
            self._onnx = OnnxRunner(session.bundle, session.batch, session.capacity, self._names, graph)

    def run(self, draws: Draws) -> Trace:
        """The session's logits and times, and its choices."""
        if not self._names:
            return run_draws(SessionRunner(self._session), draws)
        if self._onnx is not None:
            return replace(run_draws(SessionRunner(self._session), draws), choices=run_draws(self._onnx, draws).choices)
        runner = RecordingRunner(self._session, self._names)
        with runner.recording():
            return run_draws(runner, draws)
