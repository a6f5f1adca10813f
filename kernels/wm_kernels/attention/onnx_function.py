"""WmAttention: causal attention over a cache that the node writes first.

    cache[position + t] = k_t, v_t        out_t = softmax(q_t · k_s / sqrt(P), s <= position + t) v        head h uses kv head h // (H / K)

Letters: B batch, T tokens, H heads, K kv heads, Q = H / K, P head dim, S cache capacity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import FLOAT16, INT32, Body, Flavour, Value
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


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (H, K, P). `valid_B` is not read: causality hides the padding, and the next call overwrites it."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    q, k, v, cache_k, cache_v, position_B, _ = g.all_inputs()

    def masked() -> tuple[Value, ...]:
        return attend_masked(g, one, q, k, v, cache_k, cache_v, position_B)

    if takes_grouped(g, one):
        call = Call(g, g.dim(q, 0), g.dim(q, 1), position_B)
        flat = [g.reshape(x, 0, 0, -1) for x in (q, k, v)]
        out_BTE, next_k, next_v = g.branch(
            call.is_grouped,
            (g.dtype, g.dtype, g.dtype),
            lambda: attend_grouped(g, one, call, *flat, cache_k, cache_v),
            lambda: flat_output(g, masked()),
        )
        out = g.reshape(out_BTE, 0, 0, one["num_heads"], one["head_dim"])
    else:
        out, next_k, next_v = masked()
    return g.function({"out_BTHP": out, "next_k_BKSP": next_k, "next_v_BKSP": next_v})


class Call:
    """What GroupQueryAttention asks about a call, of values that all layers share.

    Free of constants, even 0 and 1, because onnxruntime merges equal nodes only where they have the very same inputs, and every inlined
    body brings constants of its own: written like this, all of it runs once per call and not once per layer.
    """

    def __init__(self, g: Body, B: Value, T: Value, position_B: Value) -> None:
        last = g.ReduceMax(position_B, keepdims=1)
        self.one = g.Shape(last)
        self.zero = self.one - self.one
        self.T = T
        self.L = last + T
        # GroupQueryAttention refuses several rows of several tokens after a past.
        self.is_grouped = g.Equal(T, self.one) | g.Equal(B, self.one) | g.Equal(last, self.zero)
        self.last_cell_B = g.Cast(position_B + (T - self.one), to=INT32)
        self.total = g.Cast(self.L, to=INT32)


def takes_grouped(g: Body, one: dict[str, Any]) -> bool:
    """Whether GroupQueryAttention takes these heads: onnxruntime's refuses widths that are no multiple of 8."""
    return g.ort and one["head_dim"] % 8 == 0


def attend_grouped(
    g: Body, one: dict[str, Any], call: Call, q: Value, k: Value | None, v: Value | None, cache_k: Value, cache_v: Value, *rotation: Value
) -> tuple[Value, ...]:
    """GroupQueryAttention on q_BTE, k and v, or on all three packed in q; `rotation` is empty or its tables of cosines and sines."""
    # A sink of -inf adds exp(-inf) = 0 to every softmax, and keeps onnxruntime 1.31 off its tiled kernel, which takes longer on a CPU.
    sink_H = g.constant(np.full(one["num_heads"], -np.inf, np.float16 if g.dtype == FLOAT16 else np.float32))
    heads = {"num_heads": one["num_heads"], "kv_num_heads": one["kv_num_heads"], "do_rotary": int(bool(rotation))}
    inputs = (q, k, v, cache_k, cache_v, call.last_cell_B, call.total, *(rotation or (None, None)), None, None, sink_H)
    outputs: tuple[Value, ...] = g.microsoft("GroupQueryAttention", *inputs, outs=3, **heads)
    return outputs


def flat_output(g: Body, values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values of `attend_masked` with out_BTHP as out_BTE."""
    return g.reshape(values[0], 0, 0, -1), *values[1:]


def attend_masked(
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
