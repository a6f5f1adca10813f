"""Runs that tell every op's outputs by their tap names: ops recorded as they run in torch, promoted graph outputs under ONNX Runtime.

B rows, T tokens, S selected tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from wm_graph.taps import OP_OUTPUTS
from wm_runtimes.bundle import Bundle
from wm_runtimes.draws import Array, Choices, Runner, SessionRunner
from wm_runtimes.op_calls import handled
from wm_runtimes.promoted_session import open_promoting

STATE = ".state"  # of a scan or convolution: one value per row, whatever the number of tokens
# Caches and windows are as long as a session makes them, and ordered as an op likes; the outputs that read them judge them.
_UNCOMPARED = ("k", "v", "score", "slot_position", "expert")
_SCORED = ("keep_window_attention", "scored_attention")
_SCORE = 3  # they take them as its fourth input; see docs/design.md


def op_of(name: str) -> str:
    """`layers.3.rope.1.y` -> `rope`, `rope_angles.cos` -> `rope_angles`, `logits` -> `logits`."""
    parts = name.split(".")
    return parts[2] if parts[0] == "layers" else parts[0]


def compared_names(names: Iterable[str]) -> tuple[str, ...]:
    """Of the names that a run recorded, the float values that every runtime computes: op outputs and recurrent states."""
    return tuple(name for name in names if name.rsplit(".", 1)[1] in OP_OUTPUTS[op_of(name)] and name.rsplit(".", 1)[1] not in _UNCOMPARED)


def rotated_pairs(values: Mapping[str, Array]) -> tuple[int, ...]:
    """Rotated pairs of each call of `rope_angles`, from its values."""
    return tuple(value.shape[-1] for name, value in values.items() if op_of(name) == "rope_angles" and name.endswith(".cos"))


class StatesApart:
    """A runner whose recurrent states, which are not per token, are kept here, those of the last call, and not told.

    Args:
        inner: the runner.
    """

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.states: dict[str, Array] = {}

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._part(self._inner.prefill(tokens_BT, valid_B, select_BS))

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._part(self._inner.extend(tokens_BT, valid_B, select_BS))

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._part(self._inner.decode(tokens_B))

    def _part(self, told: tuple[Array, Choices]) -> tuple[Array, Choices]:
        logits, values = told
        self.states = {name: value for name, value in values.items() if name.endswith(STATE)}
        return logits, {name: value for name, value in values.items() if name not in self.states}


class RecordedOps:
    """A runner in torch, eager or compiled, functional or in place, whose `wm` ops are recorded as they run, inside `recording()`.

    Ops are opaque to the compiler and run in the order of the layers, so that the n-th call of an op is the n-th of the model.

    Args:
        inner: what runs; it tells no values itself.
        names: values to tell.
        calls: names that begin with every call of the ops of `names`, in the order in which they run: those of taps, or of calls.
        pairs: `rotated_pairs`, if `rope_angles` is among the ops: angles of several widths depend on nothing, so that a
            compiler may make them in any order.
    """

    def __init__(self, inner: Runner, names: Iterable[str], calls: Iterable[str], pairs: Sequence[int] = ()) -> None:
        self._inner, self._names, self._pairs = inner, frozenset(names), tuple(pairs)
        self._told: dict[str, set[str]] = {}
        for name in self._names:
            self._told.setdefault(op_of(name), set()).add(name.rsplit(".", 1)[1])
        self._calls: dict[str, list[str]] = {}
        for prefix in dict.fromkeys(name.rpartition(".")[0] for name in calls):
            self._calls.setdefault(op_of(prefix), []).append(prefix)
        self._seen: dict[str, list[dict[str, Array]]] = {}

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BSV, _ = self._inner.prefill(tokens_BT, valid_B, select_BS)
        return logits_BSV, self._values()

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BSV, _ = self._inner.extend(tokens_BT, valid_B, select_BS)
        return logits_BSV, self._values()

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        logits_BV, _ = self._inner.decode(tokens_B)
        return logits_BV, self._values()

    def recording(self, device: str = "CPU") -> AbstractContextManager[None]:
        """For a while, every op that is told keeps what it gave; whatever kernel would have run, on the CPU or on CUDA, still does."""
        return handled(self._run, self._told, device)

    def _run(self, name: str, kernel: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        op = name.removesuffix("_")
        out = kernel(*args)
        outputs = out if isinstance(out, tuple) else (out, *_written(name, args))
        found = {**dict(zip(OP_OUTPUTS[op], outputs, strict=True)), **({"score_in": args[_SCORE]} if op in _SCORED else {})}
        self._seen.setdefault(op, []).append({key: _numpy(value) for key, value in found.items() if key in self._told[op]})
        return out

    def _values(self) -> Choices:
        """Name -> value recorded in the last call, for the names asked for."""
        self._seen.get("rope_angles", []).sort(key=lambda found: self._pairs.index(found["cos"].shape[-1]))
        values: dict[str, Array] = {}
        for op, calls in self._seen.items():
            for prefix, found in zip(self._calls[op], calls, strict=True):
                values |= {f"{prefix}.{key}": value for key, value in found.items()}
        self._seen = {}
        return {name: value for name, value in values.items() if name in self._names}


def _written(name: str, args: tuple[Any, ...]) -> list[Any]:
    """The arguments that an op wrote into: the rest of its outputs, in the same order."""
    declared = getattr(torch.ops.wm, name).default._schema.arguments
    return [value for value, one in zip(args, declared, strict=False) if one.alias_info is not None and one.alias_info.is_write]


def _numpy(value: torch.Tensor) -> Array:
    """A copy; bfloat16, which numpy lacks, as float32."""
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value.clone()).cpu().numpy()
    return array


class PromotedValues:
    """An ONNX graph of the bundle as a runner that tells the named values.

    Args:
        bundle: the bundle.
        batch: rows.
        capacity: most tokens per row.
        names: values to tell; each is an output of the node of its op, except `*.score_in`, which is its score input.
        runtime: which runtime of graphs.
        options: of the session.

    Raises:
        BundleError: the graph has no node for a name.
    """

    def __init__(
        self, bundle: Bundle, batch: int, capacity: int, names: Iterable[str], runtime: str = "onnxruntime-cpu", **options: Any
    ) -> None:
        self._session = open_promoting(bundle, runtime, batch, capacity, {name: _place(name) for name in names}, **options)
        self._inner = SessionRunner(self._session)

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._inner.prefill(tokens_BT, valid_B, select_BS)[0], self._session.told

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._inner.extend(tokens_BT, valid_B, select_BS)[0], self._session.told

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        return self._inner.decode(tokens_B)[0], self._session.told

    def close(self) -> None:
        """Close the session."""
        self._session.close()


def _place(name: str) -> tuple[str, int]:
    """The node of a named value and its place there; see `open_promoting`."""
    prefix, _, key = name.rpartition(".")
    return prefix, -1 - _SCORE if key == "score_in" else OP_OUTPUTS[op_of(name)].index(key)
