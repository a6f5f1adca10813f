"""WmAttention: causal attention over a cache that the node writes first.

    cache[position + t] = k_t, v_t        out_t = softmax(q_t · k_s / sqrt(P), s <= position + t) v        head h uses kv head h // (H / K)

Letters: B batch, T tokens, H heads, K kv heads, Q = H / K, P head dim, S cache capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import FLOAT16, INT32, Body, Flavour, Value, single
from wm_kernels.onnx_schema import FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmAttention"
INPUTS = [
    ("q_BTHP", FLOAT_T),
    ("k_BTKP", FLOAT_T),
    ("v_BTKP", FLOAT_T),
    ("cache_k_BKSP", FLOAT_T),
    ("cache_v_BKSP", FLOAT_T),
    ("position_B", INT64),
    ("valid_B", INT64),
]
OUTPUTS = [("out_BTHP", FLOAT_T), ("next_k_BKSP", FLOAT_T), ("next_v_BKSP", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"head_dim": int, "kv_num_heads": int, "num_heads": int})


def translation(q_BTHP: Any, k_BTKP: Any, v_BTKP: Any, cache_k: Any, cache_v: Any, position_B: Any, valid_B: Any) -> Any:
    """torch.ops.wm.attention to its node."""
    attributes = {"head_dim": size(q_BTHP, 3), "kv_num_heads": size(k_BTKP, 2), "num_heads": size(q_BTHP, 2)}
    return _node(q_BTHP, k_BTKP, v_BTKP, cache_k, cache_v, position_B, valid_B, **attributes)


def body(flavour: Flavour, variants: Sequence[dict[str, Any]]) -> onnx.FunctionProto:
    """The function, for one (H, K, P). `valid_B` is not read: causality hides the padding, and the next call overwrites it."""
    one = single(OP_TYPE, variants)
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    q, k, v, cache_k, cache_v, position_B, _ = g.all_inputs()
    types = (g.dtype, g.dtype, g.dtype)
    if g.ort:
        last = g.ReduceMax(position_B, keepdims=0)
        # Made outside the branches, and of shared values alone, so that onnxruntime makes them once for all layers: Size(last) is 1.
        step = g.Cast(position_B, to=INT32), g.Cast(last + g.Size(last), to=INT32)
        out, next_k, next_v = g.branch(
            g.Equal(g.dim(q, 1), 1),
            types,
            lambda: _grouped(g, one, q, k, v, cache_k, cache_v, *step),
            lambda: g.branch(
                # GroupQueryAttention refuses several rows of several tokens after a past.
                g.Equal(g.dim(q, 0), 1) | g.Equal(last, 0),
                types,
                lambda: _grouped_prefill(g, one, q, k, v, cache_k, cache_v, position_B, last),
                lambda: _masked(g, one, q, k, v, cache_k, cache_v, position_B),
            ),
        )
    else:
        out, next_k, next_v = _masked(g, one, q, k, v, cache_k, cache_v, position_B)
    return g.function({"out_BTHP": out, "next_k_BKSP": next_k, "next_v_BKSP": next_v})


def _grouped(
    g: Body,
    one: dict[str, Any],
    q: Value,
    k: Value,
    v: Value,
    cache_k: Value,
    cache_v: Value,
    seqlens_k: Value,
    total: Value,
    *sinks: Value | None,
) -> tuple[Value, ...]:
    q, k, v = (g.reshape(x, 0, 0, -1) for x in (q, k, v))
    heads = {"num_heads": one["num_heads"], "kv_num_heads": one["kv_num_heads"]}
    out_BTE, next_k, next_v = g.microsoft("GroupQueryAttention", q, k, v, cache_k, cache_v, seqlens_k, total, *sinks, outs=3, **heads)
    return g.reshape(out_BTE, 0, 0, one["num_heads"], one["head_dim"]), next_k, next_v


def _grouped_prefill(
    g: Body, one: dict[str, Any], q: Value, k: Value, v: Value, cache_k: Value, cache_v: Value, position_B: Value, last: Value
) -> tuple[Value, ...]:
    T = g.Squeeze(g.dim(q, 1), [0])
    seqlens_k, total = g.Cast(position_B + (T - 1), to=INT32), g.Cast(last + T, to=INT32)
    # A sink of -inf adds exp(-inf) = 0 to every softmax, and keeps onnxruntime 1.31 off its tiled kernel, which takes twice as long here.
    sink_H = g.constant(np.full(one["num_heads"], -np.inf, np.float16 if g.dtype == FLOAT16 else np.float32))
    return _grouped(g, one, q, k, v, cache_k, cache_v, seqlens_k, total, None, None, None, None, sink_H)


def _masked(
    g: Body, one: dict[str, Any], q: Value, k: Value, v: Value, cache_k: Value, cache_v: Value, position_B: Value
) -> tuple[Value, Value, Value]:
    """In standard ops, over all cells (onnxruntime: over those in use)."""
    P, K, H = one["head_dim"], one["kv_num_heads"], one["num_heads"]
    T, S = g.dim(q, 1), g.dim(cache_k, 2)
    cell_BT = g.unsqueeze(position_B, 1) + g.unsqueeze(g.arange(T), 0)
    cell_BKTP = g.expand(g.unsqueeze(cell_BT, 1, 3), g.dim(q, 0), K, T, P)
    next_k = g.ScatterElements(cache_k, cell_BKTP, g.transpose(k, 0, 2, 1, 3), axis=2)
    next_v = g.ScatterElements(cache_v, cell_BKTP, g.transpose(v, 0, 2, 1, 3), axis=2)
    used_k, used_v = g.f32(next_k), g.f32(next_v)
    if g.ort:
        S = g.reshape(g.ReduceMax(cell_BT, keepdims=0) + 1, 1)
        # GroupQueryAttention leaves cells past a row's end unset where past and present are two buffers; 0 * NaN would be NaN.
        written_B1S1 = g.unsqueeze(g.unsqueeze(g.arange(S), 0) <= g.unsqueeze(g.ReduceMax(cell_BT, [1], keepdims=0), 1), 1, 3)
        used_k, used_v = (g.slice(x, 0, S, 2) for x in (used_k, used_v))
        used_v = g.Where(written_B1S1, used_v, 0.0)
    q_BKQTP = g.transpose(g.reshape(g.f32(q), 0, 0, K, H // K, P), 0, 2, 3, 1, 4)
    # All queries of a kv head are rows of one product, so the cache is not repeated.
    logit_BKRS = g.reshape(q_BKQTP * P**-0.5, 0, K, -1, P) @ g.transpose(used_k, 0, 1, 3, 2)
    seen_B11TS = g.arange(S) <= g.unsqueeze(cell_BT, 1, 2, 4)
    logit_BKQTS = g.reshape(logit_BKRS, 0, K, H // K, T, S)
    hidden = g.constant(np.asarray(-np.inf, np.float32))
    weight_BKQTS = g.Softmax(g.Where(seen_B11TS, logit_BKQTS, hidden), axis=-1)
    out_BKRP = g.reshape(weight_BKQTS, 0, K, -1, S) @ used_v
    out_BTKQP = g.transpose(g.reshape(out_BKRP, 0, K, H // K, T, P), 0, 3, 1, 2, 4)
    return g.narrow(g.reshape(out_BTKQP, 0, 0, H, P)), next_k, next_v
