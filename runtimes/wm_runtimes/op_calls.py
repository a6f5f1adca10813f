"""Calls of a model's ops: their names, arguments and outputs, and a way to stand in for their kernels.

B rows, T tokens, M = B·T, K heads, S cells, W slots.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import wm_kernels
from wm_graph.config import ModelConfig
from wm_graph.taps import OP_OUTPUTS

Handler = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
_SHAPED = re.compile(r"^(?P<name>\w+?)_(?P<letters>[A-Z]\w*)$")
_STATE = re.compile(r"^(cache|slot)_|^state$")
_STATE_LEAVES = {"causal_conv1d": "conv", "ssd_scan": "ssd", "ssd_scan_rope": "ssd", "selective_scan": "scan"}
_GIVEN = ("position_B", "valid_B", "length_B")  # known to whoever feeds the tokens
SELECTING = ("router_topk", "product_key_topk")


@dataclass(frozen=True)
class Argument:
    """One argument of an op: its name without the shape, the letters of its shape (empty for plain values), where it comes from.

    `source` is `plain`, `given` (lengths and positions), `state`, or `computed`; parameters are computed ones that a call knows better.
    """

    name: str
    letters: str
    source: str

    @property
    def by_token(self) -> bool:
        """Whether it has a value per token."""
        return self.letters.startswith(("BT", "M"))


@cache
def arguments_of(op: str) -> tuple[Argument, ...]:
    """The arguments of an op, in order."""
    return tuple(_argument(argument.name) for argument in _schema(op))


def _schema(op: str) -> Any:
    return getattr(wm_kernels, op)._opoverload._schema.arguments


def _argument(name: str) -> Argument:
    found = _SHAPED.match(name)
    if found is None:
        return Argument(name, "", "plain")
    source = "given" if name in _GIVEN else "state" if _STATE.match(found["name"]) else "computed"
    return Argument(found["name"], found["letters"], source)


@cache
def reference_of(op: str) -> Callable[..., Any]:
    """The plain PyTorch reference of an op."""
    return getattr(import_module(f"wm_kernels.{op}.definition"), f"{op}_reference")


def run_reference(op: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The outputs of an op's reference, as a tuple."""
    out = reference_of(op)(*args)
    return (out,) if isinstance(out, Tensor) else tuple(out)


@dataclass(frozen=True)
class Call:
    """One call of an op in a model.

    Attributes:
        name: `layers.3.ssd_scan_rope`.
        op: `ssd_scan_rope`.
        plain: values that are no tensors, by argument.
        parameters: arguments that are parameters of the model, as stored.
        absent: arguments that are None.
        reads: argument -> names of the parameters that made it of the outputs of ops.
    """

    name: str
    op: str
    plain: Mapping[str, Any]
    parameters: Mapping[str, Tensor] = field(repr=False)
    absent: frozenset[str]
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Argument]:
        """Tensor name -> argument, of those that the model computes for this call."""
        known = self.absent | set(self.parameters)
        return {f"{self.name}.{one.name}_in": one for one in arguments_of(self.op) if one.source == "computed" and one.name not in known}

    @property
    def given(self) -> dict[str, str]:
        """Tensor name -> `position`, `valid` or `length`, of the rows' numbers that the call is told."""
        told = [one.name for one in arguments_of(self.op) if one.source == "given" and one.name not in self.absent]
        return {f"{self.name}.{name}_in": name for name in told}

    @property
    def states(self) -> dict[str, str]:
        """State argument -> leaf of the state, in the order of the outputs that return them."""
        names = [one.name for one in arguments_of(self.op) if one.source == "state"]
        return {name: self._leaf(output) for name, output in zip(names, OP_OUTPUTS[self.op][len(self.fresh) :], strict=True)}

    @property
    def fresh(self) -> tuple[str, ...]:
        """Outputs that are no states."""
        states = sum(one.source == "state" for one in arguments_of(self.op))
        return OP_OUTPUTS[self.op][: len(OP_OUTPUTS[self.op]) - states]

    @property
    def outputs(self) -> dict[str, str]:
        """Tensor name -> leaf of the state that holds it, or nothing, in order."""
        leaves = ("",) * len(self.fresh) + tuple(self.states.values())
        return {f"{self.name}.{output}": leaf for output, leaf in zip(OP_OUTPUTS[self.op], leaves, strict=True)}

    def module(self, cfg: ModelConfig) -> str:
        """The part of the model that makes the call, as its parameters are called: `layers.3.mixer`."""
        scope, _, rest = self.name.partition(f".{self.op}")
        if self.op == "rope_angles":
            return "model"
        if self.op == "residual_rms_norm":
            return f"{scope}.feed_forward_norm"
        mixer = cfg.layers[int(scope.split(".")[1])][0]
        routed_by_mixer = self.op == "router_topk" and mixer == "inner_function_attention" and not rest
        in_feed_forward = self.op in (*SELECTING, "moe_mix", "expert_mix") and not routed_by_mixer
        return f"{scope}.{'feed_forward' if in_feed_forward else 'mixer'}"

    def _leaf(self, output: str) -> str:
        scope = self.name.partition(f".{self.op}")[0]
        return f"{scope}.{_STATE_LEAVES.get(self.op, output) if output == 'state' else output}"


@dataclass
class Step:
    """What one step of a run told: a piece of the prompts, or one token per row.

    Attributes:
        number: from 0; the pieces of the prompts come first.
        tokens_BT: what was fed.
        position_B: tokens that each row had seen before.
        valid_B: tokens of each row that count.
        values: tensor name -> value, of the calls asked for; without states.
        before: state leaf -> value before the step.
        after: state leaf -> value after the step.
        logits_BTV: logits after every token; without meaning where tokens do not count.
    """

    number: int
    tokens_BT: Tensor
    position_B: Tensor
    valid_B: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    logits_BTV: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def counts_BT(self) -> Tensor:
        """Which tokens count."""
        return torch.arange(self.tokens_BT.shape[1]) < self.valid_B.unsqueeze(1)

    def given(self, letterless: str) -> Tensor:
        """`position`, `valid` or `length` of the rows."""
        values = {"position": self.position_B, "valid": self.valid_B, "length": self.position_B + self.valid_B}
        return values[letterless]

    def arguments(self, call: Call, dtype: torch.dtype | None) -> tuple[Any, ...]:
        """The arguments that the call had in this step: what was recorded, true parameters, states, lengths; floats cast to a dtype."""
        return tuple(_cast(self._argument(call, one), dtype) for one in arguments_of(call.op))

    def _argument(self, call: Call, one: Argument) -> Any:
        if one.name in call.absent:
            return None
        match one.source:
            case "plain":
                return call.plain[one.name]
            case "given":
                return self.given(one.name)
            case "state":
                return self.before[call.states[one.name]]
        return call.parameters[one.name] if one.name in call.parameters else self.values[f"{call.name}.{one.name}_in"]

    def outputs(self, call: Call) -> dict[str, Tensor]:
        """Tensor name -> what the call returned, states as the step left them."""
        return {name: self.after[leaf] if leaf else self.values[name] for name, leaf in call.outputs.items()}

    def compared(self, call: Call, outputs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensor name -> (output in an order that has a meaning, which of its entries count)."""
        if call.op == "keep_window_attention":
            outputs = _sorted_slots(call, outputs)
        return {name: (value, self._mask(call, name, value, outputs)) for name, value in outputs.items()}

    def _mask(self, call: Call, name: str, value: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        if not call.outputs[name]:
            return token_mask(value, self.counts_BT)
        if call.op == "keep_window_attention":
            used_BKW = outputs[f"{call.name}.slot_position"] >= 0
            everywhere = name.endswith((".slot_position", ".score"))
            return torch.ones_like(value, dtype=torch.bool) if everywhere else used_BKW.unsqueeze(-1).expand_as(value)
        if call.op.endswith("attention") or call.op == "attention_rope":
            used_BS = torch.arange(value.shape[2]) < (self.position_B + self.valid_B).unsqueeze(1)
            return used_BS[:, None, :, *[None] * (value.dim() - 3)].expand_as(value)
        return torch.ones_like(value, dtype=torch.bool)


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(dtype)


def token_mask(value: Tensor, counts_BT: Tensor) -> Tensor:
    """Which entries of [B, T, ...], or of [M·n, ...], belong to tokens that count."""
    batch, tokens = counts_BT.shape
    if value.dim() > 1 and value.shape[:2] == (batch, tokens):
        return counts_BT[(...,) + (None,) * (value.dim() - 2)].expand_as(value)
    rows = counts_BT.reshape(-1).repeat_interleave(value.shape[0] // (batch * tokens))
    return rows[(...,) + (None,) * (value.dim() - 1)].expand_as(value)


def _sorted_slots(call: Call, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The slots in order of position: their own order has no meaning."""
    order_BKW = outputs[f"{call.name}.slot_position"].argsort(-1)
    found = dict(outputs)
    for name, leaf in call.outputs.items():
        if leaf:
            value = outputs[name]
            index = order_BKW if value.dim() == 3 else order_BKW.unsqueeze(-1).expand_as(value)
            found[name] = value.gather(2, index)
    return found


@contextmanager
def handled(handler: Handler, ops: Container[str] = frozenset(OP_OUTPUTS), device: str = "CPU") -> Iterator[None]:
    """For a while, ops on the CPU, or CUDA, are answered by `handler(name, kernel, args)`; `kernel` is what would have answered."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    with torch.library._scoped_library("wm", "IMPL") as library:
        for name in wm_kernels.__all__:
            if name.removesuffix("_") not in ops:
                continue
            kernel = torch.library.get_kernel(f"wm::{name}", device)
            library.impl(name, partial(_pass_on, handler, name, partial(kernel.call_boxed, keys)), device)
        yield


def _pass_on(handler: Handler, name: str, kernel: Callable[..., Any], *args: Any) -> Any:
    return handler(name, kernel, args)


def all_arguments(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call with those left out, which have defaults."""
    return (*args, *(argument.default_value for argument in _schema(op)[len(args) :]))
