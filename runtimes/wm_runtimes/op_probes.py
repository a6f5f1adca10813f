"""Runs of sessions that tell what their ops got and gave: torch ops recorded as they run, ONNX graphs with promoted values."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wm_runtimes import open_session
from wm_runtimes.bundle import Bundle
from wm_runtimes.labels import open_labelled, runtime_of, way_options
from wm_runtimes.op_calls import Call, Step, arguments_of, handled
from wm_runtimes.plain_model import Feed, every_token, record_inputs
from wm_runtimes.promoted_session import open_promoting
from wm_runtimes.session import Session

Wanted = Callable[[int, str], bool]  # (step number, call name) -> whether its inputs and outputs are told


class Probe(Protocol):
    """Something that runs a feed and tells what was asked for."""

    def run(self, feed: Feed, wanted: Wanted, last: int | None = None) -> list[Step]:
        """The steps up to number `last`, or all, with their logits, states, and the values of the wanted calls."""


class TorchProbe:
    """A session of a torch runtime, compiled or not, whose ops are recorded as they run.

    Args:
        bundle: the bundle.
        runtime: `eager` or `compiled`.
        calls: the calls of a step in order.
    """

    def __init__(self, bundle: Bundle, runtime: str, calls: Sequence[Call]) -> None:
        self._bundle, self._runtime, self._calls = bundle, runtime, calls
        self._session: Session | None = None

    def run(self, feed: Feed, wanted: Wanted, last: int | None = None) -> list[Step]:
        """See `Probe`."""
        if self._session is None or (self._session.batch, self._session.capacity) != (len(feed.length_B), feed.capacity):
            self._session = open_session(self._bundle, self._runtime, len(feed.length_B), feed.capacity)
        self._session.reset()
        recorder = _Recorder(self._calls, wanted)
        with handled(recorder.answer):
            return run_session(self._session, feed, recorder.start, lambda step: None, last)


class _Recorder:
    """Matches the calls of ops with their names: the n-th call of an op, or of rotary angles of one width, is the model's n-th."""

    def __init__(self, calls: Sequence[Call], wanted: Wanted) -> None:
        self._calls, self._wanted = calls, wanted

    def start(self, step: Step) -> None:
        """From now on, calls belong to this step."""
        self._step = step
        self._waiting: dict[tuple[str, Any], list[Call]] = {}
        for call in self._calls:
            self._waiting.setdefault((call.op, call.plain.get("pairs")), []).append(call)

    def answer(self, name: str, kernel: Any, args: tuple[Any, ...]) -> Any:
        """Run the kernel and keep what it got and gave, if it is wanted."""
        op = name.removesuffix("_")
        places = {one.name: place for place, one in enumerate(arguments_of(op))}
        call = self._waiting[op, args[places["pairs"]] if "pairs" in places else None].pop(0)
        if not self._wanted(self._step.number, call.name):
            return kernel(*args)
        record_inputs(self._step, call, args)
        out = kernel(*args)
        for output, value in zip(call.fresh, (out,) if isinstance(out, Tensor) else out, strict=False):
            self._step.values[f"{call.name}.{output}"] = value.clone()
        return out


class OnnxProbe:
    """A session of ONNX Runtime, state in place, whose graph has the wanted values as further outputs.

    Args:
        bundle: the bundle.
        label: the runtime, and which of its ways.
        calls: the calls of a step in order.
    """

    def __init__(self, bundle: Bundle, label: str, calls: Sequence[Call]) -> None:
        self._bundle, self._label, self._calls = bundle, label, calls
        self._options: dict[str, Any] = {"spin": False} if runtime_of(label) == "onnxruntime-cpu" else {}

    def run(self, feed: Feed, wanted: Wanted, last: int | None = None) -> list[Step]:
        """See `Probe`."""
        numbers = range(len(feed.decoded_NB) + feed.pieces)
        calls = [call for call in self._calls if any(wanted(number, call.name) for number in numbers)]
        values = {name: place for call in calls for name, place in _wanted(call).items()}
        sizes = len(feed.length_B), feed.capacity
        if not values:  # the session as it is, which may do what no session that tells values does
            with open_labelled(self._bundle, self._label, *sizes, **self._options) as plain:
                return run_session(plain, feed, lambda step: None, lambda step: None, last)
        options = self._options | way_options(self._label)
        with open_promoting(self._bundle, runtime_of(self._label), *sizes, values, **options) as session:

            def finish(step: Step) -> None:
                told = {name for call in calls if wanted(step.number, call.name) for name in _wanted(call)}
                step.values |= {name: torch.from_numpy(value) for name, value in session.told.items() if name in told}

            return run_session(session, feed, lambda step: None, finish, last)


def _wanted(call: Call) -> dict[str, tuple[str, int]]:
    """Tensor name -> where its node has it: a node has the op's tensors as inputs, in order."""
    tensors = [one.name for one in arguments_of(call.op) if one.letters]
    arguments = {name: one.name for name, one in call.inputs.items()} | call.given
    inputs = {name: (call.name, -1 - tensors.index(argument)) for name, argument in arguments.items()}
    return inputs | {f"{call.name}.{output}": (call.name, place) for place, output in enumerate(call.fresh)}


def run_session(
    session: Session, feed: Feed, start: Callable[[Step], None], finish: Callable[[Step], None], last: int | None
) -> list[Step]:
    """The feed through a session, from its first token."""
    session._check_finite = lambda *args: None  # type: ignore[method-assign]  # where NaN comes from is what is looked for
    steps = []
    for step in feed.steps():
        step.before = _leaves(session)
        start(step)
        if step.number < feed.pieces:
            logits = session.prefill(step.tokens_BT.numpy(), step.valid_B.numpy(), select=every_token(step).numpy())
        else:
            logits = session.decode(step.tokens_BT[:, 0].numpy())[:, None]
        finish(step)
        step.after = _leaves(session)
        step.logits_BTV = torch.from_numpy(np.array(logits))
        steps.append(step)
        if step.number == last:
            break
    return steps


def _leaves(session: Session) -> dict[str, Tensor]:
    """A copy of the state."""
    found, state = {}, session._buffers.copy()
    for leaf in session.bundle.state:
        if leaf.name != "position":
            value = torch.from_numpy(state[leaf.name])
            found[leaf.name] = value.view(torch.bfloat16) if leaf.dtype == "bfloat16" else value
    return found
