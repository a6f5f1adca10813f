"""The model as plain functions that tell what every op got and gave, each op answered by its reference, or by what another run recorded.

B rows, T tokens, P longest prompt, N decode steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wm_graph.checkpoints import load_tensors
from wm_graph.model import forward
from wm_graph.oracle import oracle_forward
from wm_graph.params import Params, named_tensors, params_from_flat
from wm_graph.state import State, state_to_flat, zero_state
from wm_graph.taps import Taps
from wm_runtimes.bundle import Bundle
from wm_runtimes.op_calls import SELECTING, Call, Step, all_arguments, arguments_of, handled, run_reference


@dataclass(frozen=True)
class Feed:
    """Rows of tokens: prompts, fed in pieces, then decoded tokens.

    Attributes:
        prompt_BP: prompts, right-padded.
        length_B: their lengths, at least 1; a row of fewer tokens than pieces is empty in some.
        pieces: in how many calls they are fed.
        decoded_NB: tokens of the decode steps.
    """

    prompt_BP: Tensor
    length_B: Tensor
    pieces: int
    decoded_NB: Tensor

    @property
    def capacity(self) -> int:
        """Tokens of the longest row."""
        return self.prompt_BP.shape[1] + len(self.decoded_NB)

    def steps(self) -> Iterator[Step]:
        """What is fed in each step, without answers."""
        start_B = torch.zeros_like(self.length_B)
        for piece in range(self.pieces):
            end_B = self.length_B * (piece + 1) // self.pieces
            valid_B = end_B - start_B
            place_BT = start_B.unsqueeze(1) + torch.arange(int(valid_B.max()))
            tokens_BT = self.prompt_BP.gather(1, place_BT.clamp(max=self.prompt_BP.shape[1] - 1))
            tokens_BT = tokens_BT * (place_BT < end_B.unsqueeze(1))
            yield Step(piece, tokens_BT, start_B, valid_B)
            start_B = end_B
        for index, token_B in enumerate(self.decoded_NB):
            yield Step(self.pieces + index, token_B.unsqueeze(1), start_B + index, torch.ones_like(start_B))

    def label(self, number: int) -> str:
        """What a step is called."""
        if number < self.pieces:
            return "prefill" if self.pieces == 1 else f"prefill {number + 1} of {self.pieces}"
        return f"decode step {number - self.pieces + 1}"


class PlainModel:
    """The model of a bundle as plain functions, each op answered by its reference: the oracle in float64, the yardstick in its own dtype.

    Args:
        bundle: an open bundle.

    Attributes:
        calls: the calls of a step in order.
        read_at_end: the parameters that are applied to the outputs of ops to make the logits.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.cfg, self.dtype = bundle.config, getattr(torch, bundle.dtype)
        self.tensors = load_tensors(bundle.path)
        self.params: Params = params_from_flat(self.cfg, self.tensors)
        self.calls: tuple[Call, ...] = self._learn()

    def run(self, feed: Feed, double: bool, experts: Mapping[tuple[int, str], Tensor] | None = None) -> list[Step]:
        """Every step with every value.

        Args:
            feed: the tokens.
            double: in float64, with the parameters as stored; else in the model's dtype.
            experts: (step number, tensor name) -> experts to take in place of the model's own, with the weights that it gives them.
        """
        state = self.empty_state(feed, double)
        steps = []
        for step in feed.steps():
            step.before = state_to_flat(self.cfg, state)
            state = self._step(step, state, double, experts or {})
            step.after = state_to_flat(self.cfg, state)
            steps.append(step)
        return steps

    def greedy(self, feed: Feed, count: int) -> Feed:
        """The feed with `count` more tokens per row, each the likeliest one in the model's dtype."""
        for _ in range(count):
            last = self.run(feed, False)[-1]
            token_B = last.logits_BTV[torch.arange(len(last.valid_B)), last.valid_B - 1].argmax(-1)
            feed = replace(feed, decoded_NB=torch.cat([feed.decoded_NB, token_B.unsqueeze(0)]))
        return feed

    def empty_state(self, feed: Feed, double: bool) -> State:
        """The state before the first token."""
        return zero_state(self.cfg, len(feed.length_B), feed.capacity, torch.float64 if double else self.dtype)

    def between_ops(self, step: Step, noise: float = 0.0) -> Step:
        """The step in float64, every op answered by what was recorded there: what the code between ops should have made of it.

        Args:
            step: a step with all values.
            noise: each recorded value is moved by at most this share of itself.
        """
        generator = torch.Generator().manual_seed(0)
        ideal = replace(step, values={}, before={}, after={})
        calls = iter(self.calls)

        def answer(name: str, kernel: Any, args: tuple[Any, ...]) -> Any:
            call = next(calls)
            record_inputs(ideal, call, args)
            outputs = step.outputs(call)
            told = tuple(_moved(outputs[f"{call.name}.{output}"], noise, generator) for output in call.fresh)
            if call.op in SELECTING:
                told = (told[0], told[1].clamp(0, _options(args) - 1))
            states = tuple(args[place] for place, one in enumerate(arguments_of(call.op)) if one.source == "state")
            return told + states if len(told + states) > 1 else told[0]

        state = zero_state(self.cfg, len(step.position_B), 1, torch.float64)
        with handled(answer):
            ideal.logits_BTV, _ = self._forward(step, replace(state, position=step.position_B), True, None)
        return ideal

    def _step(self, step: Step, state: State, double: bool, experts: Mapping[tuple[int, str], Tensor]) -> State:
        calls = iter(self.calls)

        def answer(name: str, kernel: Any, args: tuple[Any, ...]) -> Any:
            call, args = next(calls), all_arguments(name, args)
            record_inputs(step, call, args)
            outputs = run_reference(call.op, args)
            if call.op in SELECTING:
                outputs = choosing(call.op, args, outputs, experts.get((step.number, f"{call.name}.expert")))
            for output, value in zip(call.fresh, outputs, strict=False):
                step.values[f"{call.name}.{output}"] = value
            # An op's outputs are never views of its inputs.
            return tuple(value.clone() for value in outputs) if len(outputs) > 1 else outputs[0].clone()

        with handled(answer):
            step.logits_BTV, after = self._forward(step, state, double, None)
        assert after is not None
        return after

    def _forward(self, step: Step, state: State, double: bool, taps: Taps | None) -> tuple[Tensor, State | None]:
        run = oracle_forward if double else forward
        with torch.no_grad():
            return run(self.cfg, self.params, step.tokens_BT, state, step.valid_B, every_token(step), taps=taps)

    def _learn(self) -> tuple[Call, ...]:
        """The calls of a step, from a run on one token."""
        named = {(tensor.data_ptr(), tensor.numel()): (name, tensor) for name, tensor in named_tensors(self.params) if tensor.numel()}
        names, seen, readings = _CallNames(), [], _Readings({place: name for place, (name, _) in named.items()})

        def answer(name: str, kernel: Any, args: tuple[Any, ...]) -> Any:
            args = all_arguments(name, args)
            seen.append((name, args, tuple(map(readings.of, args))))
            return kernel(*args)

        one = torch.zeros((1, 1), dtype=torch.int64)
        step = Step(0, one, one[0] * 0, one[0] + 1)
        with handled(answer), readings:
            logits_BTV, _ = self._forward(step, zero_state(self.cfg, 1, 2, self.dtype), False, names)
        self.read_at_end = readings.of(logits_BTV)
        tensors = {place: tensor for place, (_, tensor) in named.items()}
        return tuple(_call(name, *call, tensors) for name, call in zip(names.prefixes, seen, strict=True))


class _CallNames(Taps):
    """Taps that keep the names of the calls alone."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes: list[str] = []

    def record(self, scope: str, op: str, outputs: Sequence[Tensor]) -> None:
        """Keep the name."""
        self.prefixes.append(self._names.next(scope, op))


class _Readings(TorchFunctionMode):
    """Notes which parameters went into which tensor since the last ops.

    Args:
        names: (address, size) of a parameter -> its name.
    """

    def __init__(self, names: Mapping[tuple[int, int], str]) -> None:
        super().__init__()
        self._names = names
        self._known: dict[int, tuple[Tensor, dict[str, None]]] = {}  # with the tensors, so that no other takes their place

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; what it returns has what its arguments had, and the parameters among them."""
        out = function(*args, **(kwargs or {}))
        if getattr(function, "namespace", "") != "wm":
            read: dict[str, None] = {}
            for value in tree_leaves((args, kwargs)):
                read |= dict.fromkeys(self.of(value))
            self._known |= {id(value): (value, read) for value in tree_leaves(out) if isinstance(value, Tensor)}
        return out

    def of(self, value: Any) -> tuple[str, ...]:
        """The parameters that went into a value."""
        if not isinstance(value, Tensor):
            return ()
        name = self._names.get((value.data_ptr(), value.numel()))
        return (name,) if name else tuple(self._known[id(value)][1]) if id(value) in self._known else ()


def _call(name: str, op: str, args: tuple[Any, ...], read: tuple[tuple[str, ...], ...], named: Mapping[tuple[int, int], Tensor]) -> Call:
    given = dict(zip(arguments_of(op), args, strict=True))
    tensors = {one.name: value for one, value in given.items() if isinstance(value, Tensor)}
    parameters = {key: named[place] for key, value in tensors.items() if (place := (value.data_ptr(), value.numel())) in named}
    plain = {one.name: value for one, value in given.items() if one.source == "plain"}
    absent = frozenset(one.name for one, value in given.items() if value is None and one.source != "plain")
    reads = {one.name: names for one, names in zip(arguments_of(op), read, strict=True)}
    return Call(name, op, plain, parameters, absent, reads)


def record_inputs(step: Step, call: Call, args: tuple[Any, ...]) -> None:
    """Keep what the model computed for a call."""
    places = {one.name: place for place, one in enumerate(arguments_of(call.op))}
    for name, argument in ({name: one.name for name, one in call.inputs.items()} | call.given).items():
        step.values[name] = args[places[argument]].clone()


def every_token(step: Step) -> Tensor:
    """Indices [B, T] of the tokens whose logits are wanted: all, and the last valid one again in place of padding; 0 in empty rows."""
    return torch.minimum(torch.arange(step.tokens_BT.shape[1]), step.valid_B.unsqueeze(1) - 1).clamp(min=0)


def choosing(op: str, args: tuple[Any, ...], made: tuple[Tensor, ...], expert: Tensor | None) -> tuple[Tensor, Tensor]:
    """A selecting op's own choice (weight, expert), or the given experts, brought into range, with the weights of its inputs."""
    weight, own = made
    if expert is None:
        return weight, own
    taps = Taps({f"model.{op}.expert": expert.clamp(0, _options(args) - 1)})
    if op == "router_topk":
        return taps.choose_routed("model", args[0], args[2], (weight, own))
    return taps.choose_experts("model", args[0], args[1], (weight, own))


def _options(args: tuple[Any, ...]) -> int:
    """Among how many experts the arguments of a selecting op choose."""
    return int(args[0].shape[-1]) if args[0].dim() == 2 else int(args[1].shape[1]) ** 2


def _moved(value: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.double()
    return value * (1 + noise * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1)) if noise else value
