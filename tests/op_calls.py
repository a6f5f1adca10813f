"""One call of any op, and what can be done to a call without knowing the op: its arguments carry their axes in their names.

B rows   T tokens   M rows of a flat op   K kv heads   G groups   S cache capacity   W slots   P head dim; others as in docs/design.md
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracles
import wm_kernels as wm
from hypothesis_profiles import note_compared
from wm_graph.tolerances import FLOAT64_OP, output_limit

_CACHE = ("cache_k_BKSP", "cache_v_BKSP")
_SLOTS = ("slot_k_BKWP", "slot_v_BKWP", "slot_score_BKW", "slot_position_BKW")
# The outputs of each op; one that is named as an input is the state that the next call is given.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "rope_angles": ("cos_BTF", "sin_BTF"),
    "rope": ("y_BTHP",),
    "residual_rms_norm": ("normed_MD", "sum_MD"),
    "ssd_scan": ("y_BTHP", "state_BHNP"),
    "ssd_scan_rope": ("y_BTHP", "state_BHNP"),
    "attention": ("out_BTHP", *_CACHE),
    "attention_rope": ("out_BTE", *_CACHE),
    "keep_window_attention": ("out_BTHP", *_SLOTS),
    "product_key_topk": ("weight_BTRk", "expert_BTRk"),
    "expert_mix": ("y_BTD",),
    "scored_attention": ("out_BTHP", *_CACHE, "cache_score_BAS"),
    "router_topk": ("weight_Mk", "expert_Mk"),
    "moe_mix": ("y_MD",),
    "causal_conv1d": ("y_BTC", "state_BYC"),
    "gated_rms_norm": ("out_MC",),
    "selective_scan": ("y_BTC", "state_BCN"),
    "linear": ("a_MA", "b_MB", "c_MC", "dt_MH"),
}
OPS = tuple(OUTPUTS)
STATEFUL = tuple(op for op in OPS if {"state", "cache", "slot"} & {name.split("_")[0] for name in OUTPUTS[op]})
# Arguments in the accumulation dtype: float32, or float64 for float64 inputs.
_WIDE = {"dt", "A", "state", "score", "slot_score", "cache_score", "cos", "sin"}


def axes(name: str) -> str:
    """x_BTHP -> BTHP."""
    return name.rsplit("_", 1)[1]


def by_token(name: str) -> bool:
    """Whether the argument has an entry for each row and token."""
    return axes(name).startswith("BT")


Named = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """Arguments of one op, in the op's order.

    Attributes:
        op: name without `wm::`.
        tensors: every tensor argument, None where it is left out.
        plain: the other arguments.
        attributes: those of the op's ONNX node.
    """

    op: str
    tensors: dict[str, Tensor | None]
    plain: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> tuple[str, ...]:
        """The arguments that the call returns anew."""
        return tuple(name for name in OUTPUTS[self.op] if name in self.tensors)

    def run(self) -> Named:
        """Outputs of the op; without the empty states of a call that was given none of them."""
        return self._named(getattr(wm, self.op)(**self.tensors, **self.plain))

    def run_reference(self) -> Named:
        """Outputs of the op's plain reference."""
        reference = getattr(sys.modules[f"wm_kernels.{self.op}.definition"], f"{self.op}_reference")
        return self._named(reference(**self.tensors, **self.plain))

    def run_in_place(self) -> Named:
        """Outputs of the op's second form, whose states are those of a copy of this call that it has written to."""
        call = self.copied()
        out = getattr(wm, f"{self.op}_")(**call.tensors, **call.plain)
        return {OUTPUTS[self.op][0]: out} | {name: call.given(name) for name in self.states}

    def _named(self, outputs: Tensor | tuple[Tensor, ...]) -> Named:
        named = dict(zip(OUTPUTS[self.op], (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))
        return {name: value for name, value in named.items() if value.numel() or not name.startswith(("cache", "slot"))}

    def given(self, name: str) -> Tensor:
        """An argument that is not left out."""
        value = self.tensors[name]
        assert value is not None, f"{self.op}: {name} is left out"
        return value

    def has(self, name: str) -> bool:
        """Whether the argument exists and is given."""
        return self.tensors.get(name) is not None

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Call":
        """The call with every given tensor changed."""
        return replace(self, tensors={name: None if value is None else change(name, value) for name, value in self.tensors.items()})

    def changed(self, tensors: Mapping[str, Tensor | None]) -> "Call":
        """The call with other tensors for the names given; names that the op does not have are passed over."""
        return replace(self, tensors=self.tensors | {name: value for name, value in tensors.items() if name in self.tensors})

    def copied(self) -> "Call":
        """The call on tensors of its own, with the strides of the given ones."""
        return self.mapped(lambda _, value: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value))

    @property
    def size(self) -> tuple[int, int]:
        """(B, T)."""
        B, T = next(value.shape[:2] for name, value in self.tensors.items() if value is not None and by_token(name))
        return B, T

    @property
    def count_B(self) -> Tensor:
        """Tokens of each row that count."""
        B, T = self.size
        return self.given("valid_B") if self.has("valid_B") else torch.full((B,), T)

    def to(self, dtype: torch.dtype) -> "Call":
        """The call rounded to a model's dtype; what ops keep wide becomes float32, or float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(name: str, value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            return value.to(wide if name.rsplit("_", 1)[0] in _WIDE else dtype)

        call = self.mapped(cast)
        return replace(call, plain=self.plain | {"double": dtype == torch.float64}) if self.op == "rope_angles" else call

    def double(self) -> "Call":
        """The very same numbers in float64."""
        return self.to(torch.float64)

    def rows(self, index: Iterable[int]) -> "Call":
        """The call of some rows, in the order given: rows of the batch, or of a flat op."""
        chosen = torch.tensor(list(index))
        flat = "M" if any(axes(name)[0] == "M" for name in self.tensors) else "B"
        return self.mapped(lambda name, value: value.index_select(0, chosen) if axes(name)[0] == flat else value)

    def piece(self, start: int, end: int) -> "Call":
        """The call of tokens start .. end - 1, after those before: states are still those of the first token."""
        call = self.mapped(lambda name, value: value[:, start:end] if by_token(name) else value)
        if self.has("valid_B"):
            call = call.changed({"valid_B": (self.count_B - start).clamp(0, end - start)})
        if self.has("position_B"):
            call = call.changed({"position_B": self.given("position_B") + self.count_B.clamp(max=start)})
        return call

    def in_pieces(self, cuts: Iterable[int], in_place: bool = False) -> Named:
        """Outputs of the tokens cut in front of each of `cuts`, each piece given the states that the last one left."""
        _, T = self.size
        bounds = [0, *sorted({cut for cut in cuts if 0 < cut < T}), T]
        states: Named = {}
        parts: dict[str, list[Tensor]] = {name: [] for name in OUTPUTS[self.op] if by_token(name)}
        for start, end in pairwise(bounds):
            piece = self.piece(start, end).changed(states)
            found = piece.run_in_place() if in_place else piece.run()
            states = {name: found[name] for name in self.states if name in found}
            for name, part in parts.items():
                part.append(found[name])
        return {name: torch.cat(part, 1) for name, part in parts.items()} | states

    def with_states(self) -> "Call":
        """The call with a state that holds nothing, if it was given none: caches of exactly T cells, `window` empty slots, zeros."""
        if not self.states or all(self.has(name) for name in self.states):
            return self
        B, T = self.size
        if self.op in ("ssd_scan", "ssd_scan_rope", "causal_conv1d", "selective_scan"):
            return self.changed({name: torch.zeros_like(value) for name, value in self.run().items()})
        k = self.tensors.get("k_BTKP")
        K, P = (self.plain["n_kv_head"], self.plain["head_dim"]) if k is None else k.shape[2:]
        kind = self.given("qkv_BTC" if k is None else "k_BTKP").dtype
        cells = self.plain.get("window", T)
        keys = torch.zeros((B, K, cells, P), dtype=kind)
        new: Named = dict.fromkeys((*_CACHE, *_SLOTS[:2]), keys) | {"position_B": torch.zeros(B, dtype=torch.int64)}
        if self.op == "scored_attention":
            score_BTA = self.given("score_BTA")
            new["cache_score_BAS"] = score_BTA.new_zeros((B, score_BTA.shape[2], T))
        if self.op == "keep_window_attention":
            new["slot_score_BKW"] = self.given("score_BTK").new_full((B, K, cells), -torch.inf)
            new["slot_position_BKW"] = torch.full((B, K, cells), -1)
        return self.changed({name: value.clone() for name, value in new.items()})

    def meaningful(self, outputs: Named) -> Named:
        """What of the outputs has a meaning: valid tokens, cells in use, slots by position; zeros elsewhere.

        Outputs of padding must still be finite; unused cells need not be.
        """
        found = dict(outputs)
        if "slot_position_BKW" in found:
            order = found["slot_position_BKW"].argsort(-1)
            used = found["slot_position_BKW"].gather(2, order) >= 0
            for name in _SLOTS:
                leaf = found[name].gather(2, order if found[name].dim() == 3 else order.unsqueeze(-1).expand_as(found[name]))
                found[name] = leaf * used.unsqueeze(-1) if leaf.dim() == 4 else leaf
        for name, value in found.items():
            if name.startswith("cache"):
                found[name] = _first(value, 2, self.given("position_B") + self.count_B)
            if value.is_floating_point() and name != "slot_score_BKW":
                assert found[name].isfinite().all(), f"{self.op}: {name} is not finite: {found[name]}"
            if by_token(name) and self.has("valid_B"):
                found[name] = _first(value, 1, self.count_B)
        return found


def _first(value: Tensor, axis: int, count_B: Tensor) -> Tensor:
    """The first entries of each row along an axis; zeros after them."""
    real = torch.arange(value.shape[axis]) < count_B.unsqueeze(1)
    shape = [value.shape[0], *[1] * (value.dim() - 1)]
    shape[axis] = value.shape[axis]
    return torch.where(real.reshape(shape), value, torch.zeros((), dtype=value.dtype))


def same(call: Call, found: Named, expected: Named, what: str = "") -> None:
    """Every output of `expected` is in `found`, bit for bit."""
    note_compared(_telling(expected))
    for name, value in expected.items():
        assert torch.equal(found[name], value), _difference(call, name, found[name], value, 0.0, what)


def _telling(expected: Named) -> int:
    """How many numbers are not 0: an op that computes nothing gets zeros right."""
    return sum(int((value.isfinite() & (value != 0)).sum()) for value in expected.values() if value.is_floating_point())


def differ(one: Call, other: Call) -> bool:
    """Whether any argument differs, in its shape, its values or where it lies in memory: a call compared with itself proves nothing."""

    def apart(name: str, value: Tensor) -> bool:
        twin = other.given(name)
        return value.shape != twin.shape or _layout(value) != _layout(twin) or not torch.equal(value, twin)

    return any(apart(name, value) for name, value in one.tensors.items() if value is not None)


def _layout(value: Tensor) -> tuple[int, ...]:
    """Offset and strides; those of axes of one entry say nothing."""
    return value.storage_offset(), *(step for step, size in zip(value.stride(), value.shape, strict=True) if size > 1)


def near(call: Call, found: Named, expected: Named, scale: Mapping[str, float], what: str = "", runtime: str = "eager") -> None:
    """Every output of `expected` is in `found`: integers and infinities are equal, numbers apart by the limit of op and dtype at most."""
    note_compared(_telling(expected))
    for name, value in expected.items():
        other = found[name]
        assert other.shape == value.shape, _difference(call, name, other, value, 0.0, what)
        if not value.is_floating_point():
            assert torch.equal(other, value), _difference(call, name, other, value, 0.0, what)
            continue
        a, b = other.double(), value.double()
        # Below its normal numbers a dtype is no longer exact to a fraction.
        allowed = limit_of(call, other.dtype, runtime) * scale[name] + 2 * torch.finfo(other.dtype).smallest_normal
        assert ((a == b) | ((a - b).abs() <= allowed)).all(), _difference(call, name, a, b, allowed, what)


def _difference(call: Call, name: str, found: Tensor, expected: Tensor, allowed: float, what: str) -> str:
    if found.shape != expected.shape:
        return f"{call.op} {what}: {name} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    gap = torch.where(found == expected, 0.0, (found.double() - expected.double()).abs().nan_to_num(torch.inf))
    worst = np.unravel_index(int(gap.argmax()), gap.shape)
    values = f"{found[worst]} where {expected[worst]} was expected"
    return f"{call.op} {what}: {name}{[int(i) for i in worst]} is {values}, {float(gap.max()):.3g} apart of {allowed:.3g} allowed"


def judged(call: Call, outputs: Named) -> Named:
    """`meaningful`, where picks of product keys are judged by their scores: rounding may order scores that differ by less."""
    found = call.meaningful(outputs)
    if call.op == "product_key_topk":
        query, keys, expert = call.given("query_BTR2d").double(), call.given("keys_RJ2d").double(), found.pop("expert_BTRk")
        x_BTRJ, y_BTRJ = torch.einsum("btrhd,rjhd->hbtrj", query, keys)
        J = keys.shape[1]
        score = x_BTRJ.gather(-1, expert // J) + y_BTRJ.gather(-1, expert % J)
        found["score_BTRk"] = score.to(found["weight_BTRk"].dtype)
    return found


def limit_of(call: Call, dtype: torch.dtype, runtime: str = "eager") -> float:
    """The largest error of an output of this dtype, as a fraction of its scale."""
    if dtype == torch.float64:
        return FLOAT64_OP
    inputs = next(value.dtype for value in call.tensors.values() if value is not None)
    return output_limit(call.op, *(str(kind).removeprefix("torch.") for kind in (inputs, dtype)), runtime).relative


def from_oracle(call: Call) -> Named:
    """What the naive float64 loops of oracles give, in the layout of `meaningful`."""
    t, plain = call.tensors, call.plain
    if call.op in ("attention", "attention_rope"):
        q, k, v = _rotated_heads(call) if call.op == "attention_rope" else (t["q_BTHP"], t["k_BTKP"], t["v_BTKP"])
        out, live = oracles.attention(q, k, v, t["cache_k_BKSP"], t["cache_v_BKSP"], t["position_B"], t["valid_B"])
        out = out.flatten(2) if call.op == "attention_rope" else out
        if not call.has("cache_k_BKSP"):
            return {OUTPUTS[call.op][0]: out}
        cells = [[live[b, g] for g in range(call.given("cache_k_BKSP").shape[1])] for b in range(len(out))]
        return {OUTPUTS[call.op][0]: out} | {
            name: _padded([[pair[leaf] for pair in row] for row in cells], call.given(name)) for leaf, name in enumerate(_CACHE)
        }
    if call.op == "scored_attention":
        caches = tuple(t[name] for name in (*_CACHE, "cache_score_BAS")) if call.has("cache_k_BKSP") else None
        tokens = (t[name] for name in ("q_BTHP", "k_BTKP", "v_BTKP", "score_BTA"))
        out, rows = oracles.scored_attention(*tokens, caches, t["position_B"], t["valid_B"], plain["scoring"], plain["ratio"])
        leaves = (
            {} if caches is None else {name: _padded([r[i] for r in rows], call.given(name)) for i, name in enumerate(OUTPUTS[call.op][1:])}
        )
        return {"out_BTHP": out} | leaves
    if call.op == "keep_window_attention":
        return _window_oracle(call)
    if call.op == "ssd_scan_rope":
        names = ("x_BTHP", "dt_BTH", "A_H", "B_BTGN", "C_BTGN", "state_BHNP", "valid_B", "cos_BTF", "sin_BTF")
        outputs: Any = oracles.ssd_scan(*(t[name] for name in names))
    else:
        outputs = getattr(oracles, call.op)(*t.values(), *plain.values())
    return dict(zip(OUTPUTS[call.op], (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))


def _rotated_heads(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    H, K, P = (call.plain[name] for name in ("n_head", "n_kv_head", "head_dim"))
    heads = call.given("qkv_BTC").unflatten(2, (H + 2 * K, P))
    turned = oracles.rope(heads[:, :, : H + K], call.given("cos_BTF"), call.given("sin_BTF"))
    return turned[:, :, :H], turned[:, :, H:], heads[:, :, H + K :]


def _padded(rows: list[list[list[np.ndarray]]], like: Tensor) -> Tensor:
    """Lists of live cells of each row and head as one cache, zeros after them."""
    cache = torch.zeros(like.shape, dtype=torch.float64)
    for b, heads in enumerate(rows):
        for h, cells in enumerate(heads):
            if cells:
                cache[b, h, : len(cells)] = torch.from_numpy(np.array(cells))
    return cache


def _window_oracle(call: Call) -> Named:
    t = call.tensors
    slots = tuple(t[name] for name in _SLOTS) if call.has("slot_k_BKWP") else None
    W = call.plain["window"] if slots is None else call.given("slot_k_BKWP").shape[2]
    tokens = (t[name] for name in ("q_BTHP", "k_BTKP", "v_BTKP", "score_BTK"))
    out, kept = oracles.keep_window_attention(*tokens, slots, t["position_B"], t["valid_B"], W)
    if slots is None:
        return {"out_BTHP": out}
    k = torch.zeros(call.given("slot_k_BKWP").shape, dtype=torch.float64)
    v, score, position = k.clone(), torch.full(k.shape[:3], -torch.inf, dtype=torch.float64), torch.full(k.shape[:3], -1)
    for (b, g), records in kept.items():
        for w, (place, value, key, mix) in enumerate(records, W - len(records)):
            position[b, g, w], score[b, g, w] = place, value
            k[b, g, w], v[b, g, w] = torch.from_numpy(key), torch.from_numpy(mix)
    return {"out_BTHP": out} | dict(zip(_SLOTS, (k, v, score, position), strict=True))
