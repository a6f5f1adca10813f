"""WmKeepWindowAttention: attention over the W best-ranked keys so far; those W keys are the whole state.

    out_i = softmax(q_i · k_j / sqrt(P) + score_j, j kept for i) v        rank: larger score, then later position

A key's number of betters only grows, so with rank_j its place among all keys of the call

    key j is kept for query i    <=>    base_j + #{new l <= i: rank_l < rank_j} < W

where base_j counts the slots that outrank key j: one sort, comparisons and one CumSum, no ranking per query. An empty slot has
position -1 and score -inf.

Letters: B batch, T new tokens, H heads, K kv heads, Q = H / K, P head dim, W slots, J = W + T keys (slots first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import FLOAT, INT64, UINT8, Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, size, wm_op
from wm_kernels.onnx_schema import INT64 as INT64_T

OP_TYPE = "WmKeepWindowAttention"
INPUTS = [
    ("q_BTHP", FLOAT_T),
    ("k_BTKP", FLOAT_T),
    ("v_BTKP", FLOAT_T),
    ("score_BTK", FLOAT32),
    ("slot_k_BKWP", FLOAT_T),
    ("slot_v_BKWP", FLOAT_T),
    ("slot_score_BKW", FLOAT32),
    ("slot_position_BKW", INT64_T),
    ("position_B", INT64_T),
    ("valid_B", INT64_T),
]
OUTPUTS = [
    ("out_BTHP", FLOAT_T),
    ("next_k_BKWP", FLOAT_T),
    ("next_v_BKWP", FLOAT_T),
    ("next_score_BKW", FLOAT32),
    ("next_position_BKW", INT64_T),
]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"head_dim": int, "kv_num_heads": int, "num_heads": int, "window": int})

# Finite, so that a row that sees no key gives a mean of what is there instead of NaN.
_HIDDEN = -1e30
_BLOCK = 32  # queries whose counts are summed at once
_LEAST = -3.4e38  # a float32 above the least finite one, below any score but -inf


def translation(
    q_BTHP: Any,
    k_BTKP: Any,
    v_BTKP: Any,
    score_BTK: Any,
    slot_k: Any,
    slot_v: Any,
    slot_score: Any,
    slot_position: Any,
    position_B: Any,
    valid_B: Any,
    window: int,
) -> Any:
    """torch.ops.wm.keep_window_attention to its node."""
    attributes = {"head_dim": size(q_BTHP, 3), "kv_num_heads": size(k_BTKP, 2), "num_heads": size(q_BTHP, 2), "window": window}
    return _node(q_BTHP, k_BTKP, v_BTKP, score_BTK, slot_k, slot_v, slot_score, slot_position, position_B, valid_B, **attributes)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (H, K, P); W is the slots' own."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    node = _Node(g, one["num_heads"], one["kv_num_heads"], one["head_dim"], *g.all_inputs())
    types = (g.dtype, g.dtype, g.dtype, FLOAT, INT64)
    values: Sequence[Value]
    if g.ort:
        values = g.branch(g.Equal(g.Squeeze(node.T, [0]), 1), types, node.one_token, lambda: _by_room(g, node, types))
    else:
        values = node.many_tokens()
    return g.function({name: value for (name, _), value in zip(OUTPUTS, values, strict=True)})


def _by_room(g: Body, node: _Node, types: Sequence[int]) -> Sequence[Value]:
    """Several tokens: where no key can be evicted there is nothing to rank, and empty slots need not be attended to."""
    used = g.ReduceMax(g.ReduceSum(g.int64(node.slot_position >= 0), [2], keepdims=0), keepdims=0)
    fits = g.Squeeze(used + node.T <= node.W, [0])
    return g.branch(
        fits & g.Equal(used, 0),
        types,
        node.into_empty_slots,
        lambda: g.branch(fits, types, lambda: node.many_tokens(ranked=False), node.many_tokens),
    )


@dataclass
class _Keys:
    """Slots and new keys in one list. Slot inputs are read only to make these: a runtime may overwrite them afterwards."""

    k_BKJP: Value
    v_BKJP: Value
    score_BKJ: Value
    position_BKJ: Value


@dataclass
class _Node:
    """The inputs of one node and the two ways to compute it."""

    g: Body
    H: int
    K: int
    P: int
    q_BTHP: Value
    k_BTKP: Value
    v_BTKP: Value
    score_BTK: Value
    slot_k: Value
    slot_v: Value
    slot_score: Value
    slot_position: Value
    position_B: Value
    valid_B: Value

    @property
    def T(self) -> Value:
        """The number of new tokens, 1-D."""
        return self.g.dim(self.q_BTHP, 1)

    @property
    def W(self) -> Value:
        """The number of slots, 1-D."""
        return self.g.dim(self.slot_score, 2)

    def new_positions(self) -> Value:
        """[B, T]: the position of each new token, -1 where it does not exist."""
        g = self.g
        t_1T = g.unsqueeze(g.arange(self.T), 0)
        return g.Where(t_1T < g.unsqueeze(self.valid_B, 1), g.unsqueeze(self.position_B, 1) + t_1T, -1)

    def attend(self, k_BKJP: Value, v_BKJP: Value, score_BKJ: Value, keys: Value, mask: Value | None = None) -> Value:
        """Softmax attention in float32; `mask` is [T, J] or [B, K, T, J]."""
        g, Q = self.g, self.H // self.K
        q_BKQTP = g.transpose(g.reshape(g.f32(self.q_BTHP), 0, 0, self.K, Q, self.P), 0, 2, 3, 1, 4)
        # All queries of a kv head are rows of one product, so its keys are not repeated.
        q_BKRP = g.reshape(q_BKQTP * self.P**-0.5, 0, self.K, -1, self.P)
        logit_BKRJ = q_BKRP @ g.transpose(g.f32(k_BKJP), 0, 1, 3, 2) + g.unsqueeze(g.Max(score_BKJ, _HIDDEN), 2)
        if mask is not None:
            mask = mask if Q == 1 else g.unsqueeze(mask, -3)
            logit_BKQTJ = logit_BKRJ if Q == 1 else g.reshape(logit_BKRJ, 0, self.K, Q, self.T, keys)
            logit_BKRJ = g.Where(mask, logit_BKQTJ, _HIDDEN)
            logit_BKRJ = logit_BKRJ if Q == 1 else g.reshape(logit_BKRJ, 0, self.K, -1, keys)
        out_BKRP = g.Softmax(logit_BKRJ, axis=-1) @ g.f32(v_BKJP)
        out_BKQTP = g.reshape(out_BKRP, 0, self.K, Q, self.T, self.P)
        return g.narrow(g.reshape(g.transpose(out_BKQTP, 0, 3, 1, 2, 4), 0, 0, self.H, self.P))

    def one_token(self) -> Sequence[Value]:
        """Put the new key over the worst slot if it outranks it, then attend over the slots."""
        g = self.g
        worst_BK1 = g.ReduceMin(self.slot_score, [2], keepdims=1)
        # Of equal scores the earliest position is the worst; an empty slot has the least of both.
        position_BKW = g.Where(self.slot_score <= worst_BK1, self.slot_position, 2**62)
        slot_BK1 = g.ArgMin(position_BKW, axis=2, keepdims=1)
        position_B11 = g.unsqueeze(self.new_positions(), 2)
        score_BK1 = g.transpose(self.score_BTK, 0, 2, 1)
        enters_BK1 = (score_BK1 >= worst_BK1) & (position_B11 >= 0)
        position_BK1 = g.Where(enters_BK1, position_B11, g.GatherElements(self.slot_position, slot_BK1, axis=2))
        next_position = g.ScatterElements(self.slot_position, slot_BK1, position_BK1, axis=2)
        next_score = g.ScatterElements(self.slot_score, slot_BK1, g.Where(enters_BK1, score_BK1, worst_BK1), axis=2)
        slot_BK1P = g.expand(g.unsqueeze(slot_BK1, 3), 1, 1, 1, self.P)
        next_k, next_v = (
            self._replace(slot, new, slot_BK1P, g.unsqueeze(enters_BK1, 3))
            for slot, new in ((self.slot_k, self.k_BTKP), (self.slot_v, self.v_BTKP))
        )
        return self._attend_to_used(next_k, next_v, next_score, next_position), next_k, next_v, next_score, next_position

    def _attend_to_used(self, k_BKWP: Value, v_BKWP: Value, score_BKW: Value, position_BKW: Value) -> Value:
        """One token's attention; while the window fills, over the slots up to the last one in use, so that a large window costs nothing."""
        g = self.g
        last_BK = g.ArgMax(g.Cast(position_BKW >= 0, to=UINT8), axis=2, keepdims=0, select_last_index=1)
        used, W = g.reshape(g.ReduceMax(last_BK, keepdims=0) + 1, 1), g.dim(score_BKW, 2)

        def of_used() -> list[Value]:
            k_BKUP, v_BKUP, score_BKU = (g.slice(x, 0, used, 2) for x in (k_BKWP, v_BKWP, score_BKW))
            return [self.attend(k_BKUP, v_BKUP, score_BKU, used)]

        (out,) = g.branch(used < W, [g.dtype], of_used, lambda: [self.attend(k_BKWP, v_BKWP, score_BKW, W)])
        return out

    def _replace(self, slots: Value, new_BTKP: Value, slot_BK1P: Value, enters_BK11: Value) -> Value:
        g = self.g
        old_BK1P = g.GatherElements(slots, slot_BK1P, axis=2)
        new_BK1P = g.Where(enters_BK11, g.transpose(new_BTKP, 0, 2, 1, 3), old_BK1P)
        return g.ScatterElements(slots, slot_BK1P, new_BK1P, axis=2)

    def new_keys(self) -> _Keys:
        """The new tokens' keys, those past `valid` as if they were empty slots."""
        g = self.g
        position_B1T = g.unsqueeze(self.new_positions(), 1)
        score_BKT = g.Where(position_B1T >= 0, g.transpose(self.score_BTK, 0, 2, 1), _minus_infinity(g))
        k_BKTP, v_BKTP = (g.transpose(x, 0, 2, 1, 3) for x in (self.k_BTKP, self.v_BTKP))
        return _Keys(k_BKTP, v_BKTP, score_BKT, g.expand(position_B1T, 1, self.K, 1))

    def into_empty_slots(self) -> Sequence[Value]:
        """No slot is in use and all new keys fit: plain causal attention, then the new keys are the slots."""
        g = self.g
        new = self.new_keys()
        t_T = g.arange(self.T)
        causal_TT = g.unsqueeze(t_T, 0) <= g.unsqueeze(t_T, 1)
        out = self.attend(new.k_BKJP, new.v_BKJP, new.score_BKJ, self.T, causal_TT)
        pads = g.shape(0, self.W - self.T)
        next_k, next_v = (g.Pad(x, pads, None, [2]) for x in (new.k_BKJP, new.v_BKJP))
        return out, next_k, next_v, g.Pad(new.score_BKJ, pads, _minus_infinity(g), [2]), g.Pad(new.position_BKJ, pads, -1, [2])

    def many_tokens(self, ranked: bool = True) -> Sequence[Value]:
        """The general form; `ranked` False where no key can be evicted."""
        g, new = self.g, self.new_keys()
        keys = _Keys(
            g.Concat(self.slot_k, new.k_BKJP, axis=2),
            g.Concat(self.slot_v, new.v_BKJP, axis=2),
            g.Concat(self.slot_score, new.score_BKJ, axis=2),
            g.Concat(self.slot_position, new.position_BKJ, axis=2),
        )
        J = g.dim(keys.score_BKJ, 2)
        i_T, j_J = g.arange(self.T), g.arange(J) - self.W
        mask = g.unsqueeze(j_J, 0) <= g.unsqueeze(i_T, 1)
        kept_BKJ = keys.position_BKJ >= 0
        if ranked:
            betters_BKTJ, room_BKJ = self._betters(keys, kept_BKJ)
            mask = (betters_BKTJ < g.unsqueeze(room_BKJ, 2)) & mask
            kept_BKJ = g.Squeeze(g.slice(betters_BKTJ, -1, 2**62, 2), [2]) < room_BKJ
        out = self.attend(keys.k_BKJP, keys.v_BKJP, keys.score_BKJ, J, mask)
        return out, *self._best(keys, kept_BKJ, J)

    def _betters(self, keys: _Keys, exists_BKJ: Value) -> tuple[Value, Value]:
        """How many new keys up to query i outrank key j, [B, K, T, J], and the number of them that evicts it, 0 for no key."""
        g = self.g
        all_J = g.dim(keys.score_BKJ, 2)
        # Score, then position, by two sorts that need no order of equal values and no -inf: on CUDA, ONNX Runtime keeps none above 256
        # keys, and fills rows up with the least finite float, which it takes for a larger key than -inf.
        best_BKJ, by_score_BKJ = g.TopK(g.Max(keys.score_BKJ, _LEAST), all_J, axis=2, outs=2)
        ahead_BKJ = g.Concat(g.slice(best_BKJ, 0, 1, 2), g.slice(best_BKJ, 0, -1, 2), axis=2)
        level_BKJ = g.CumSum(g.int64(best_BKJ < ahead_BKJ), 2)
        level_BKJ = g.ScatterElements(by_score_BKJ, by_score_BKJ, level_BKJ, axis=2)
        # Keys that do not exist come last and outrank none.
        _, order_BKJ = g.TopK(level_BKJ * 2**32 + (2**31 - keys.position_BKJ), all_J, axis=2, largest=0, outs=2)
        place_J = g.arange(all_J)
        rank_BKJ = g.ScatterElements(order_BKJ, order_BKJ, g.expand(place_J, g.node("Shape", order_BKJ)), axis=2)
        # The slots ahead of each place of the order, brought back to the keys.
        slots_BKJ = g.CumSum(g.int64(order_BKJ < self.W), 2, exclusive=1)
        room_BKJ = g.Where(exists_BKJ, self.W - g.pick(slots_BKJ, rank_BKJ), 0)
        # Ranks and counts stay below 2^24, exact in float32.
        rank_BKJ = g.to_f32(rank_BKJ)
        rank_new_BKT1 = g.unsqueeze(g.slice(rank_BKJ, self.W, 2**62, 2), 3)
        outranks_BKTJ = rank_new_BKT1 < g.unsqueeze(rank_BKJ, 2)
        return self._summed(g.to_f32(outranks_BKTJ), all_J), g.to_f32(room_BKJ)

    def _summed(self, x_BKTJ: Value, all_J: Value) -> Value:
        """The running sum over T. In blocks but for onnxruntime's CPU provider: on CUDA it adds up every element from the start."""
        g = self.g
        if g.ort:
            return g.CumSum(x_BKTJ, 2)
        whole_BKTJ = g.Pad(x_BKTJ, g.shape(0, g.Mod(0 - self.T, _BLOCK)), None, [2])
        inner_BKNCJ = g.CumSum(g.reshape(whole_BKTJ, 0, self.K, -1, _BLOCK, all_J), 3)
        before_BKN1J = g.CumSum(g.slice(inner_BKNCJ, -1, 2**62, 3), 2, exclusive=1)
        return g.slice(g.reshape(inner_BKNCJ + before_BKN1J, 0, self.K, -1, all_J), 0, self.T, 2)

    def _best(self, keys: _Keys, kept_BKJ: Value, J: Value) -> tuple[Value, ...]:
        """The kept keys (at most W) in list order, then empty slots."""
        g = self.g
        j_J = g.arange(J)
        order_BKJ = g.Where(kept_BKJ, j_J, j_J + g.Squeeze(J, [0]))
        first_BKW, pick_BKW = g.TopK(order_BKJ, self.W, axis=2, largest=0, outs=2)
        filled_BKW = first_BKW < J
        next_score = g.Where(filled_BKW, g.pick(keys.score_BKJ, pick_BKW), _minus_infinity(g))
        next_position = g.Where(filled_BKW, g.pick(keys.position_BKJ, pick_BKW), -1)
        # Whole rows by one flat index: GatherElements would need an index as large as the keys.
        row_BK1 = g.reshape(g.arange(g.dim(pick_BKW, 0) * self.K), -1, self.K, 1)
        flat_BKW = pick_BKW + row_BK1 * J
        next_k, next_v = (g.Gather(g.reshape(x, -1, self.P), flat_BKW) for x in (keys.k_BKJP, keys.v_BKJP))
        return next_k, next_v, next_score, next_position


def _minus_infinity(g: Body) -> Value:
    return g.constant(np.asarray(-np.inf, np.float32))
