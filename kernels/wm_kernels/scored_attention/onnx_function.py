"""WmScoredAttention: causal attention over a cache that the node writes first, with a score per key.

    cache[position + t] = k_t, v_t, score_t        s visible <=> s <= position + t
    additive: out_t = softmax(q_t · k_s / sqrt(P) + score_s, s visible) v
    binary:   without the score, over visible keys of score_s >= 1; zeros where there is none
    ratio:    as additive, without score_s < tau, the m-th smallest score of the n visible keys, m = floor(ratio n)

One sort of the scores serves all queries: in its order, tau is the least score up to which m visible keys are counted.

Letters: B batch, T tokens, H heads, K kv heads, P head dim, A score heads, S cache capacity, L cells that are read, Q queries of one span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmScoredAttention"
INPUTS = [
    ("q_BTHP", FLOAT_T),
    ("k_BTKP", FLOAT_T),
    ("v_BTKP", FLOAT_T),
    ("score_BTA", FLOAT32),
    ("cache_k_BKSP", FLOAT_T),
    ("cache_v_BKSP", FLOAT_T),
    ("cache_score_BAS", FLOAT32),
    ("position_B", INT64),
    ("valid_B", INT64),
]
OUTPUTS = [("out_BTHP", FLOAT_T), ("next_k_BKSP", FLOAT_T), ("next_v_BKSP", FLOAT_T), ("next_score_BAS", FLOAT32)]
# The ratio is written out in decimal: an attribute of type float would round it, and ratio · n may fall on the other side of an integer.
_ATTRIBUTES = {"head_dim": int, "kv_num_heads": int, "num_heads": int, "ratio": str, "score_num_heads": int, "scoring": str}
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, _ATTRIBUTES)

# The onnxruntime body takes this many queries at a time: their logits stay in cache, and keys after the last of them are not read.
_SPAN = 64
# Finite, so that a query that sees no key has a softmax.
_HIDDEN = -1e30


def translation(
    q_BTHP: Any,
    k_BTKP: Any,
    v_BTKP: Any,
    score_BTA: Any,
    cache_k: Any,
    cache_v: Any,
    cache_score: Any,
    position_B: Any,
    valid_B: Any,
    scoring: str,
    ratio: float,
) -> Any:
    """torch.ops.wm.scored_attention to its node."""
    attributes: dict[str, int | str] = {"head_dim": size(q_BTHP, 3), "kv_num_heads": size(k_BTKP, 2), "num_heads": size(q_BTHP, 2)}
    attributes |= {"scoring": scoring, "ratio": repr(float(ratio)), "score_num_heads": size(score_BTA, 2)}
    return _node(q_BTHP, k_BTKP, v_BTKP, score_BTA, cache_k, cache_v, cache_score, position_B, valid_B, **attributes)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (H, K, P, A), scoring and ratio. `valid_B` is not read: see `attention`."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    q_BTHP, k, v, score, cache_k, cache_v, cache_score, position_B, _ = g.all_inputs()
    H, K, P, A = (one[name] for name in ("num_heads", "kv_num_heads", "head_dim", "score_num_heads"))
    T = g.dim(q_BTHP, 1)
    cell_BT = g.unsqueeze(position_B, 1) + g.unsqueeze(g.arange(T), 0)
    cell_BKTP = g.expand(g.unsqueeze(cell_BT, 1, 3), g.dim(q_BTHP, 0), K, T, P)
    next_k = g.ScatterElements(cache_k, cell_BKTP, g.transpose(k, 0, 2, 1, 3), axis=2)
    next_v = g.ScatterElements(cache_v, cell_BKTP, g.transpose(v, 0, 2, 1, 3), axis=2)
    cell_BAT = g.expand(g.unsqueeze(cell_BT, 1), 1, A, 1)
    next_score = g.ScatterElements(cache_score, cell_BAT, g.transpose(score, 0, 2, 1), axis=2)
    used = [next_k, next_v, next_score]
    if g.ort:
        live = g.reshape(g.ReduceMax(cell_BT, keepdims=0) + 1, 1)
        used = [g.slice(x, 0, live, 2) for x in used]
    keys = _Keys(g, H, K, P, A, one["scoring"], g.f32(used[0]), g.f32(used[1]), used[2])
    ranking = _Ranking.of(g, keys.score_BAL, float(one["ratio"])) if one["scoring"] == "ratio" else None
    q_BTHP = g.f32(q_BTHP)
    if g.ort:
        (out_BTHP,) = g.branch(
            g.Squeeze(T, [0]) <= _SPAN,
            (FLOAT,),
            lambda: [keys.attend(q_BTHP, cell_BT, ranking)],
            lambda: [_in_spans(g, keys, q_BTHP, cell_BT, ranking)],
        )
    else:
        out_BTHP = keys.attend(q_BTHP, cell_BT, ranking)
    values = (g.narrow(out_BTHP), next_k, next_v, next_score)
    return g.function({name: value for (name, _), value in zip(OUTPUTS, values, strict=True)})


def _in_spans(g: Body, keys: _Keys, q_BTHP: Value, cell_BT: Value, ranking: _Ranking | None) -> Value:
    """More than _SPAN queries: whole spans from the front; the last one is moved back to end at T, and its overlap is cut."""
    T, L = g.dim(q_BTHP, 1), g.dim(keys.score_BAL, 2)

    def step(i: Value) -> Value:
        start = g.Min(g.unsqueeze(i * _SPAN, 0), T - _SPAN)
        end = start + _SPAN
        near = keys.first(L - T + end)
        return near.attend(g.slice(q_BTHP, start, end, 1), g.slice(cell_BT, start, end, 1), ranking)

    count = g.Squeeze((T + (_SPAN - 1)) / _SPAN, [0])
    out_CBQHP = g.each(count, FLOAT, step)
    out_BTHP = g.reshape(g.transpose(out_CBQHP, 1, 0, 2, 3, 4), g.dim(q_BTHP, 0), -1, keys.H, keys.P)
    whole, end = (T / _SPAN) * _SPAN, g.dim(out_BTHP, 1)
    return g.Concat(g.slice(out_BTHP, 0, whole, 1), g.slice(out_BTHP, end - (T - whole), end, 1), axis=1)


@dataclass
class _Ranking:
    """Scores in ascending order and their cells, for scoring "ratio"."""

    g: Body
    ratio: float
    score_BAL: Value
    cell_BAL: Value

    @classmethod
    def of(cls, g: Body, score_BAL: Value, ratio: float) -> _Ranking:
        """Sort the scores of each head."""
        return cls(g, ratio, *g.TopK(score_BAL, g.dim(score_BAL, 2), axis=2, largest=0, outs=2))

    def least(self, cell_B1T1: Value) -> Value:
        """tau [B, A, T, 1]; for m = 0 the least of all scores, which hides nothing."""
        g = self.g
        m_B1T1 = g.to_f32(g.int64(g.Cast(cell_B1T1 + 1, to=TensorProto.DOUBLE) * g.constant(np.asarray(self.ratio, np.float64))))
        # Counts stay below 2^24, exact in float32. The sum runs over an axis before the last, which onnxruntime adds as vectors.
        visible_BALT = g.to_f32(g.unsqueeze(self.cell_BAL, 3) <= g.transpose(cell_B1T1, 0, 1, 3, 2))
        enough_BALT = g.CumSum(visible_BALT, 2) >= g.transpose(m_B1T1, 0, 1, 3, 2)
        infinity = g.constant(np.asarray(np.inf, np.float32))
        tau_BA1T = g.ReduceMin(g.Where(enough_BALT, g.unsqueeze(self.score_BAL, 3), infinity), [2], keepdims=1)
        return g.transpose(tau_BA1T, 0, 1, 3, 2)


@dataclass
class _Keys:
    """The cells that are read, in float32."""

    g: Body
    H: int
    K: int
    P: int
    A: int
    scoring: str
    k_BKLP: Value
    v_BKLP: Value
    score_BAL: Value

    def first(self, count: Value) -> _Keys:
        """The first cells."""
        leaves = (self.g.slice(x, 0, count, 2) for x in (self.k_BKLP, self.v_BKLP, self.score_BAL))
        return _Keys(self.g, self.H, self.K, self.P, self.A, self.scoring, *leaves)

    def attend(self, q_BTHP: Value, cell_BT: Value, ranking: _Ranking | None) -> Value:
        """Softmax attention of queries at the given cells."""
        g, (H, K, P, A) = self.g, (self.H, self.K, self.P, self.A)
        T, L = g.dim(q_BTHP, 1), g.dim(self.score_BAL, 2)
        cell_B1T1, bias_BATL = g.unsqueeze(cell_BT, 1, 3), g.unsqueeze(self.score_BAL, 2)
        # What hides a key is added, so that only causality is left to be a mask, one for all heads.
        if self.scoring == "binary":
            bias_BATL = g.Where(bias_BATL >= 1.0, 0.0, _HIDDEN)
        if ranking is not None:
            bias_BATL = g.Where(bias_BATL >= ranking.least(cell_B1T1), bias_BATL, _HIDDEN)
        # All queries of a kv head are rows of one product, so the cache is not repeated; the heads of a score are then taken together.
        q_BKRP = g.reshape(g.transpose(q_BTHP * P**-0.5, 0, 2, 1, 3), 0, K, -1, P)
        logit = g.reshape(q_BKRP @ g.transpose(self.k_BKLP, 0, 1, 3, 2), 0, A, H // A, T, L) + g.unsqueeze(bias_BATL, 2)
        weight = g.Softmax(g.Where(g.unsqueeze(g.arange(L) <= cell_B1T1, 2), logit, _HIDDEN), axis=-1)
        out_BKRP = g.reshape(weight, 0, K, -1, L) @ self.v_BKLP
        out_BHTP = g.reshape(out_BKRP, 0, H, T, P)
        if self.scoring == "binary":
            first_BA1 = g.ReduceMin(g.Where(self.score_BAL >= 1.0, g.arange(L), 2**62), [2], keepdims=1)
            seen_BA1T1 = g.unsqueeze(first_BA1 <= g.unsqueeze(cell_BT, 1), 2, 4)
            out_BHTP = g.reshape(g.Where(seen_BA1T1, g.reshape(out_BHTP, 0, A, H // A, T, P), 0.0), 0, H, T, P)
        return g.transpose(out_BHTP, 0, 2, 1, 3)
