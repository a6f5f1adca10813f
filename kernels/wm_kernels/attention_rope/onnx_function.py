"""WmAttentionRope: rotate the queries and keys of a packed projection, then WmAttention.

    q, k, v = split(qkv)        cache[position + t] = rot_t(k_t), v_t        out_t = softmax(rot_t(q_t) · k_s / sqrt(P), s <= pos + t) v

Letters: B batch, T tokens, H heads, K kv heads, P head dim, F rotated pairs, S cache capacity, L cells in use, C = (H + 2K)·P, E = H·P.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.attention.onnx_function import Call, attend_grouped, attend_masked, flat_output, takes_grouped
from wm_kernels.onnx_body import FLOAT, Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, size, wm_op
from wm_kernels.rope.onnx_function import rotate

OP_TYPE = "WmAttentionRope"
INPUTS = [
    ("qkv_BTC", FLOAT_T),
    ("cos_BTF", FLOAT32),
    ("sin_BTF", FLOAT32),
    ("cache_k_BKSP", FLOAT_T),
    ("cache_v_BKSP", FLOAT_T),
    ("position_B", INT64),
    ("valid_B", INT64),
]
OUTPUTS = [("out_BTE", FLOAT_T), ("next_k_BKSP", FLOAT_T), ("next_v_BKSP", FLOAT_T)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"head_dim": int, "kv_num_heads": int, "num_heads": int, "pairs": int})


def translation(
    qkv: Any, cos: Any, sin: Any, cache_k: Any, cache_v: Any, position_B: Any, valid_B: Any, n_head: int, n_kv_head: int, head_dim: int
) -> Any:
    """torch.ops.wm.attention_rope to its node."""
    attributes = {"head_dim": head_dim, "kv_num_heads": n_kv_head, "num_heads": n_head, "pairs": size(cos, 2)}
    return _node(qkv, cos, sin, cache_k, cache_v, position_B, valid_B, **attributes)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (H, K, P, F)."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    qkv, cos, sin, cache_k, cache_v, position_B, _ = g.all_inputs()

    def masked() -> tuple[Value, ...]:
        return flat_output(g, attend_masked(g, one, *_rotated(g, one, qkv, cos, sin), cache_k, cache_v, position_B))

    if not takes_grouped(g, one):
        out, next_k, next_v = masked()
    else:
        call = Call(g, g.dim(cos, 0), g.dim(cos, 1), position_B)
        tables = _tables(g, call, cos, sin, position_B) if _rotates_inside(g, one) else ()

        def grouped() -> tuple[Value, ...]:
            if tables:
                return attend_grouped(g, one, call, qkv, None, None, cache_k, cache_v, *tables)
            flat = (g.reshape(x, 0, 0, -1) for x in _rotated(g, one, qkv, cos, sin))
            return attend_grouped(g, one, call, *flat, cache_k, cache_v)

        out, next_k, next_v = g.branch(call.is_grouped, (g.dtype, g.dtype, g.dtype), grouped, masked)
    return g.function({"out_BTE": out, "next_k_BKSP": next_k, "next_v_BKSP": next_v})


def _rotates_inside(g: Body, one: dict[str, Any]) -> bool:
    """Whether GroupQueryAttention does the rotation: of whole heads, their width a multiple of 16, in float32.

    In float16 it would round the angles, the products and their sum.
    """
    return g.dtype == FLOAT and one["head_dim"] == 2 * one["pairs"] and one["head_dim"] % 16 == 0


def _rotated(g: Body, one: dict[str, Any], qkv: Value, cos: Value, sin: Value) -> tuple[Value, Value, Value]:
    H, K, P = one["num_heads"], one["kv_num_heads"], one["head_dim"]
    qk_BTHP, v_BTKP = g.Split(g.reshape(qkv, 0, 0, H + 2 * K, P), [H + K, K], axis=2, outs=2)
    rotated_BTHP = g.narrow(rotate(g, g.f32(qk_BTHP), cos, sin, H + K, P, one["pairs"]))
    q_BTHP, k_BTKP = g.Split(rotated_BTHP, [H, K], axis=2, outs=2)
    return q_BTHP, k_BTKP, v_BTKP


def _tables(g: Body, call: Call, cos: Value, sin: Value, position_B: Value) -> tuple[Value, Value]:
    """GroupQueryAttention looks angles up by position: tables of L rows that hold the call's own. Free of constants, as `Call`."""
    arange_T = g.Range(*(g.Squeeze(x) for x in (call.zero, call.T, call.one)))
    cell_BT1 = g.Unsqueeze(g.Unsqueeze(position_B, call.one) + arange_T, call.one + call.one)
    zeros_LF = g.ConstantOfShape(g.Concat(call.L, g.dim(cos, 2), axis=0))
    return g.ScatterND(zeros_LF, cell_BT1, cos), g.ScatterND(zeros_LF, cell_BT1, sin)
