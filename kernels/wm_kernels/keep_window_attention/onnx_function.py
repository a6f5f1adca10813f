"""WmKeepWindowAttention: attention over the W best-ranked keys so far; those W keys are the whole state.

    out_i = softmax(q_i · k_j / sqrt(P) + score_j, j kept for i) v        rank: larger score, then later position

A key's number of betters only grows, so with beats[l, j] = (new key l outranks key j)

    key j is kept for query i    <=>    base_j + sum_(l <= i) beats[l, j] < W

where base_j counts the slots that outrank key j: comparisons and one CumSum, no ranking per query. A new key is later than every slot, so it
outranks a slot of equal score. An empty slot has position -1 and score -inf.

Letters: B batch, T new tokens, H heads, K kv heads, Q = H / K, P head dim, W slots, J = W + T keys (slots first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import FLOAT, INT64, Body, Flavour, Value, single
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


def body(flavour: Flavour, variants: Sequence[dict[str, Any]]) -> onnx.FunctionProto:
    """The function, for one (H, K, P); W is the slots' own."""
    one = single(OP_TYPE, variants)
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    node = _Node(g, one["num_heads"], one["kv_num_heads"], one["head_dim"], *g.all_inputs())
    types = (g.dtype, g.dtype, g.dtype, FLOAT, INT64)
    if g.ort:
        values = g.branch(g.Equal(g.Squeeze(node.T, [0]), 1), types, node.one_token, node.many_tokens)
    else:
        values = node.many_tokens()
    return g.function({name: value for (name, _), value in zip(OUTPUTS, values, strict=True)})


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
        return g.Where(t_1T < g.unsqueeze(self.valid_B, 1), g.unsqueeze(self.position_B, 1) + t_1T, -1)  # type: ignore[no-any-return]

    def attend(self, k_BKJP: Value, v_BKJP: Value, bias: Value, keys: Value) -> Value:
        """Softmax attention in float32; `bias` is [B, K, 1 or T, J]."""
        g, Q = self.g, self.H // self.K
        q_BKQTP = g.transpose(g.reshape(g.f32(self.q_BTHP), 0, 0, self.K, Q, self.P), 0, 2, 3, 1, 4)
        # All queries of a kv head are rows of one product, so its keys are not repeated.
        logit_BKRJ = g.reshape(q_BKQTP * self.P**-0.5, 0, self.K, -1, self.P) @ g.transpose(g.f32(k_BKJP), 0, 1, 3, 2)
        logit_BKQTJ = g.reshape(logit_BKRJ, 0, self.K, Q, self.T, keys) + g.unsqueeze(bias, 2)
        weight_BKRJ = g.reshape(g.Softmax(logit_BKQTJ, axis=-1), 0, self.K, -1, keys)
        out_BKQTP = g.reshape(weight_BKRJ @ g.f32(v_BKJP), 0, self.K, Q, self.T, self.P)
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
        seen_BKW = next_position >= 0
        bias_BK1W = g.unsqueeze(g.Where(seen_BKW, g.Max(next_score, _HIDDEN), _HIDDEN), 2)
        return self.attend(next_k, next_v, bias_BK1W, self.W), next_k, next_v, next_score, next_position

    def _replace(self, slots: Value, new_BTKP: Value, slot_BK1P: Value, enters_BK11: Value) -> Value:
        g = self.g
        old_BK1P = g.GatherElements(slots, slot_BK1P, axis=2)
        new_BK1P = g.Where(enters_BK11, g.transpose(new_BTKP, 0, 2, 1, 3), old_BK1P)
        return g.ScatterElements(slots, slot_BK1P, new_BK1P, axis=2)  # type: ignore[no-any-return]

    def many_tokens(self) -> Sequence[Value]:
        """The general form."""
        g = self.g
        position_B1T = g.unsqueeze(self.new_positions(), 1)
        new_position_BKT = g.expand(position_B1T, 1, self.K, 1)
        score_BKT = g.Where(position_B1T >= 0, g.transpose(self.score_BTK, 0, 2, 1), g.constant(np.asarray(-np.inf, np.float32)))
        keys = _Keys(
            g.Concat(self.slot_k, g.transpose(self.k_BTKP, 0, 2, 1, 3), axis=2),
            g.Concat(self.slot_v, g.transpose(self.v_BTKP, 0, 2, 1, 3), axis=2),
            g.Concat(self.slot_score, score_BKT, axis=2),
            g.Concat(self.slot_position, new_position_BKT, axis=2),
        )
        J = g.dim(keys.score_BKJ, 2)
        i_T, j_J = g.arange(self.T), g.arange(J) - self.W
        causal_TJ = g.unsqueeze(j_J, 0) <= g.unsqueeze(i_T, 1)
        exists_BKJ = keys.position_BKJ >= 0
        room_BKTJ, room_last_BKJ = self._room(keys, score_BKT, exists_BKJ)
        kept_BKTJ = (room_BKTJ > 0.0) & causal_TJ & g.unsqueeze(exists_BKJ, 2)
        bias_BKTJ = g.Where(kept_BKTJ, g.unsqueeze(g.Max(keys.score_BKJ, _HIDDEN), 2), _HIDDEN)
        out = self.attend(keys.k_BKJP, keys.v_BKJP, bias_BKTJ, J)
        return out, *self._best(keys, (room_last_BKJ > 0.0) & exists_BKJ, J)

    def _room(self, keys: _Keys, score_BKT: Value, exists_BKJ: Value) -> tuple[Value, Value]:
        """W - base_j - sum_(l <= i) beats[l, j] as [B, K, T, J] floats, and its last row."""
        g = self.g
        slot_score_BKW, slot_position_BKW = (g.slice(x, 0, self.W, 2) for x in (keys.score_BKJ, keys.position_BKJ))
        # Two stable sorts give the slots by score, then position; a slot's place in that order is its base.
        _, by_position_BKW = g.TopK(slot_position_BKW, self.W, axis=2, outs=2)
        _, by_score_BKW = g.TopK(g.pick(slot_score_BKW, by_position_BKW), self.W, axis=2, outs=2)
        order_BKW = g.pick(by_position_BKW, by_score_BKW)
        place_BKW = g.Add(order_BKW * 0, g.arange(self.W))
        base_slot_BKW = g.to_f32(g.ScatterElements(order_BKW, order_BKW, place_BKW, axis=2))
        better_BKWT = g.unsqueeze(slot_score_BKW, 3) > g.unsqueeze(score_BKT, 2)
        base_new_BKT = g.ReduceSum(g.to_f32(better_BKWT), [2], keepdims=0)
        base_BKJ = g.Concat(base_slot_BKW, base_new_BKT, axis=2)

        score_BKT1 = g.unsqueeze(score_BKT, 3)
        l_T = g.arange(self.T)
        later_TT = g.unsqueeze(l_T, 1) > g.unsqueeze(l_T, 0)
        new_score_BK1T = g.unsqueeze(score_BKT, 2)
        beats_new_BKTT = (score_BKT1 > new_score_BK1T) | (later_TT & g.Equal(score_BKT1, new_score_BK1T))
        beats_BKTJ = g.Concat(score_BKT1 >= g.unsqueeze(slot_score_BKW, 2), beats_new_BKTT, axis=3)
        exists_new_BKT1 = g.unsqueeze(g.slice(exists_BKJ, self.W, 2**62, 2), 3)
        # Counts stay below 2^24, exact in float32.
        count_BKTJ = g.CumSum(g.to_f32(beats_BKTJ & exists_new_BKT1), 2)
        left_BKJ = g.to_f32(self.W) - base_BKJ
        room_last_BKJ = left_BKJ - g.Squeeze(g.slice(count_BKTJ, -1, 2**62, 2), [2])
        return g.unsqueeze(left_BKJ, 2) - count_BKTJ, room_last_BKJ

    def _best(self, keys: _Keys, kept_BKJ: Value, J: Value) -> tuple[Value, ...]:
        """The kept keys (at most W) in list order, then empty slots."""
        g = self.g
        j_J = g.arange(J)
        order_BKJ = g.Where(kept_BKJ, j_J, j_J + g.Squeeze(J, [0]))
        first_BKW, pick_BKW = g.TopK(order_BKJ, self.W, axis=2, largest=0, outs=2)
        filled_BKW = first_BKW < J
        empty = g.constant(np.asarray(-np.inf, np.float32))
        next_score = g.Where(filled_BKW, g.pick(keys.score_BKJ, pick_BKW), empty)
        next_position = g.Where(filled_BKW, g.pick(keys.position_BKJ, pick_BKW), -1)
        # Whole rows by one flat index: GatherElements would need an index as large as the keys.
        row_BK1 = g.reshape(g.arange(g.dim(pick_BKW, 0) * self.K), -1, self.K, 1)
        flat_BKW = pick_BKW + row_BK1 * J
        next_k, next_v = (g.Gather(g.reshape(x, -1, self.P), flat_BKW) for x in (keys.k_BKJP, keys.v_BKJP))
        return next_k, next_v, next_score, next_position
