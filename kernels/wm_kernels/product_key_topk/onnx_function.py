"""WmProductKeyTopk: the k best experts of each retrieval head, expert (i, j) scoring query_0 · key_i0 + query_1 · key_j1.

    best k of each half -> k·k sums -> best k; expert = i J + j; weight = softmax of the k scores

Order: larger score, then lower expert index.

Letters: B batch, T tokens, M = B·T, R retrieval heads, J sub-keys per half, k picks, d half width.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour
from wm_kernels.onnx_schema import FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmProductKeyTopk"
INPUTS = [("query_BTR2d", FLOAT_T), ("keys_RJ2d", FLOAT_T)]
OUTPUTS = [("weight_BTRk", FLOAT_T), ("expert_BTRk", INT64)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"k": int, "num_heads": int, "num_keys": int})


def translation(query_BTR2d: Any, keys_RJ2d: Any, k: int) -> Any:
    """torch.ops.wm.product_key_topk to its node."""
    return _node(query_BTR2d, keys_RJ2d, k=k, num_heads=size(keys_RJ2d, 0), num_keys=size(keys_RJ2d, 1))


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (k, R, J)."""
    k, R, J = one["k"], one["num_heads"], one["num_keys"]
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    query_BTR2d, keys_RJ2d = g.all_inputs()
    query_MR2d = g.reshape(g.f32(query_BTR2d), -1, R, 2, g.dim(query_BTR2d, 4))
    query_R2Md = g.transpose(query_MR2d, 1, 2, 0, 3)
    keys_R2dJ = g.transpose(g.f32(keys_RJ2d), 0, 2, 3, 1)
    best_R2Mk, index_R2Mk = g.TopK(query_R2Md @ keys_R2dJ, [k], axis=-1, outs=2)
    # TopK breaks ties by lower list position: with both halves in index order, that is the lower expert.
    index_R2Mk, place_R2Mk = g.TopK(index_R2Mk, [k], axis=-1, largest=0, outs=2)
    best_R2Mk = g.pick(best_R2Mk, place_R2Mk)
    first_RMk, second_RMk = (g.Squeeze(v, [1]) for v in g.Split(best_R2Mk, [1, 1], axis=1, outs=2))
    i_RMk, j_RMk = (g.Squeeze(v, [1]) for v in g.Split(index_R2Mk, [1, 1], axis=1, outs=2))
    sum_RMkk = g.unsqueeze(first_RMk, 3) + g.unsqueeze(second_RMk, 2)
    expert_RMkk = g.unsqueeze(i_RMk * J, 3) + g.unsqueeze(j_RMk, 2)
    score_RMk, pick_RMk = g.TopK(g.reshape(sum_RMkk, R, -1, k * k), [k], axis=-1, outs=2)
    expert_RMk = g.pick(g.reshape(expert_RMkk, R, -1, k * k), pick_RMk)
    shape_BTRk = g.shape(g.node("Shape", query_BTR2d, start=0, end=2), R, k)
    weight_MRk = g.transpose(g.Softmax(score_RMk, axis=-1), 1, 0, 2)
    weight_BTRk = g.Reshape(weight_MRk, shape_BTRk)
    expert_BTRk = g.Reshape(g.transpose(expert_RMk, 1, 0, 2), shape_BTRk)
    return g.function({"weight_BTRk": g.narrow(weight_BTRk), "expert_BTRk": expert_BTRk})
