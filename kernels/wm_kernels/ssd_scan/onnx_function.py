"""WmSsdScan: the state space recurrence of one call, in chunks of L tokens.

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t ⊗ B_t        y_t = S_t C_t        head h uses group h // (H / G); tokens t >= valid act as dt = 0

With a = dt A and seg[l, s] = a_(s+1) + .. + a_l, a chunk that starts from state S gives

    y_l = sum_(s<=l) exp(seg[l, s]) (C_l · B_s) dt_s x_s + exp(a_0 + .. + a_l) S C_l

and the chunks' own end states are carried over by the same decay matrix, one row per chunk, so no Scan or Loop is needed.
onnxruntime's body is one step for one token, and for more com.microsoft LinearAttention or, where heads share a group and tokens are
many, chunks in a Scan.

Letters: B batch, T tokens, H heads, G groups, Q = H / G, P head dim, N state, C chunks, L tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from wm_kernels.onnx_body import BOOL, DOUBLE, FLOAT, Body, Flavour, Value, single
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, size, wm_op

OP_TYPE = "WmSsdScan"
INPUTS = [
    ("x_BTHP", FLOAT_T),
    ("dt_BTH", FLOAT32),
    ("A_H", FLOAT32),
    ("B_BTGN", FLOAT_T),
    ("C_BTGN", FLOAT_T),
    ("state_BHPN", FLOAT32),
    ("valid_B", INT64),
]
OUTPUTS = [("y_BTHP", FLOAT_T), ("next_BHPN", FLOAT32)]
ATTRIBUTES = {"head_dim": int, "num_groups": int, "num_heads": int, "state_dim": int}
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, ATTRIBUTES)

CHUNK = 64


def sizes(x_BTHP: Any, B_BTGN: Any) -> dict[str, int]:
    """The static dimensions that a body needs, as node attributes."""
    return {"head_dim": size(x_BTHP, 3), "num_groups": size(B_BTGN, 2), "num_heads": size(x_BTHP, 2), "state_dim": size(B_BTGN, 3)}


def translation(x_BTHP: Any, dt_BTH: Any, A_H: Any, B_BTGN: Any, C_BTGN: Any, state_BHPN: Any, valid_B: Any) -> Any:
    """torch.ops.wm.ssd_scan to its node."""
    return _node(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, valid_B, **sizes(x_BTHP, B_BTGN))


def body(flavour: Flavour, variants: Sequence[dict[str, Any]]) -> onnx.FunctionProto:
    """The function, for one (H, G, P, N)."""
    one = single(OP_TYPE, variants)
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHPN, valid_B = g.all_inputs()
    y_BTHP, next_BHPN = scan(g, one, g.f32(x_BTHP), dt_BTH, A_H, g.f32(B_BTGN), g.f32(C_BTGN), state_BHPN, valid_B)
    return g.function({"y_BTHP": g.narrow(y_BTHP), "next_BHPN": next_BHPN})


def scan(
    g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value, valid_B: Value
) -> tuple[Value, Value]:
    """The recurrence on float32 values, also used by WmSsdScanRope."""
    if not g.ort:
        return _chunks(g, one, x, _masked(g, dt, valid_B), A_H, B, C, state)
    # Free of constants, so that onnxruntime makes this once for all layers: it merges equal nodes only where they have the same inputs.
    one_1 = g.Shape(g.ReduceMax(valid_B, keepdims=1))
    exists_B11 = g.Unsqueeze(g.Cast(valid_B, to=BOOL), g.Concat(one_1, one_1 + one_1, axis=0))
    y, after = g.branch(
        g.Equal(g.dim(x, 1), one_1),
        (FLOAT, FLOAT),
        lambda: _step(g, one, x, g.Where(exists_B11, dt, 0.0), A_H, B, C, state),
        lambda: _many(g, one, x, _masked(g, dt, valid_B), A_H, B, C, state),
    )
    return y, after


def _many(g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value) -> Sequence[Value]:
    """More than one token. Chunks pay where heads share a group and their fixed cost, 0.15 ms a call, is spread over many tokens."""
    given = (g, one, x, dt, A_H, B, C, state)
    if one["num_groups"] == one["num_heads"]:
        return _linear_attention(*given)
    long = g.Squeeze(g.dim(x, 1), [0]) > CHUNK // 2
    return g.branch(long, (FLOAT, FLOAT), lambda: _scan_chunks(*given), lambda: _linear_attention(*given))


def _masked(g: Body, dt: Value, valid_B: Value) -> Value:
    """dt_BTH, 0 for tokens that do not count."""
    exists_BT = g.unsqueeze(g.arange(g.dim(dt, 1)), 0) < g.unsqueeze(valid_B, 1)
    return g.Where(g.unsqueeze(exists_BT, 2), dt, 0.0)


def _step(g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value) -> tuple[Value, Value]:
    """One token, with nothing padded or transposed.

    LinearAttention with key dt x and value B makes the next state in one pass over it, where standard ops take five. Its own output
    contracts the wrong axis and is not used.
    """
    H, G, P, N = one["num_heads"], one["num_groups"], one["head_dim"], one["state_dim"]
    key = x * g.unsqueeze(dt, 3)
    _, next_BHPN = _gated(g, H, key, key, _per_head(g, one, B), state, dt * A_H)
    y_BGQP1 = g.reshape(next_BHPN, -1, G, H // G, P, N) @ g.reshape(C, -1, G, 1, N, 1)
    return g.reshape(y_BGQP1, -1, 1, H, P), next_BHPN


def _linear_attention(
    g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value
) -> tuple[Value, Value]:
    """The recurrence as gated linear attention: query C, key B, value dt x, and a state with its last axes exchanged."""
    H, P = one["num_heads"], one["head_dim"]
    query, key = (_per_head(g, one, v) for v in (C, B))
    y, after = _gated(g, H, query, key, x * g.unsqueeze(dt, 3), g.transpose(state, 0, 1, 3, 2), dt * A_H)
    return g.reshape(y, 0, 0, H, P), g.transpose(after, 0, 1, 3, 2)


def _per_head(g: Body, one: dict[str, Any], v_BTGN: Value) -> Value:
    """B or C with its groups repeated for their heads."""
    H, G, N = one["num_heads"], one["num_groups"], one["state_dim"]
    return v_BTGN if G == H else g.expand(g.unsqueeze(v_BTGN, 3), 1, 1, G, H // G, N)


def _gated(g: Body, H: int, query: Value, key: Value, value: Value, state: Value, decay_BTH: Value) -> tuple[Value, Value]:
    """com.microsoft LinearAttention, gated by one log decay per head and token: output [B, T, .] and the state after it."""
    flat = (g.reshape(v, 0, 0, -1) for v in (query, key, value))
    heads = {"q_num_heads": H, "kv_num_heads": H, "update_rule": "gated", "scale": 1.0}
    y, after = g.microsoft("LinearAttention", *flat, state, decay_BTH, outs=2, **heads)
    return y, after


def _scan_chunks(g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value) -> tuple[Value, Value]:
    """The chunks one after another, the heads of a group side by side (E = Q P): its C B^T, C S and B^T x are one product each.

    LinearAttention makes these for each head, of B and C repeated for them: Mamba2-115M's prefill of 512 tokens takes 690 ms with it and
    616 ms with this (2 threads; H = 24, G = 1).
    """
    H, G, P, N = one["num_heads"], one["num_groups"], one["head_dim"], one["state_dim"]
    Q, E = H // G, H // G * P
    batch, T = g.dim(x, 0), g.dim(x, 1)
    L = g.Min(T, [CHUNK])
    count = (T + L - 1) / L
    l_L, last = g.arange(L), T - 1
    causal_LL = g.to_f32(g.unsqueeze(l_L, 1) >= g.unsqueeze(l_L, 0))

    dt_BSH = g.Pad(dt, g.shape(0, count * L - T), 0.0, [1])
    dt_CBLH = g.transpose(g.reshape(dt_BSH, 0, count, L, H), 1, 0, 2, 3)
    # In double, then as two float32 parts, so that a small difference of large sums keeps its digits.
    sum_CBLH = g.CumSum(g.Cast(dt_CBLH * A_H, to=DOUBLE), 2)
    total_CB1H = g.slice(sum_CBLH, -1, 2**62, 2)
    total_CBGQ1 = g.reshape(_exp(g, total_CB1H), count, -1, G, Q, 1)
    total_CBG1E = g.reshape(g.expand(total_CBGQ1, 1, 1, 1, 1, P), count, -1, G, 1, E)
    sum_CBHL = g.unsqueeze(g.transpose(sum_CBLH, 0, 1, 3, 2), 4)
    high_CBHL1 = g.Cast(sum_CBHL, to=FLOAT)
    low_CBHL1 = g.Cast(sum_CBHL - g.Cast(high_CBHL1, to=DOUBLE), to=FLOAT)
    one_CBHL1 = g.Expand(1.0, g.Shape(high_CBHL1))
    # seg[l, s] = high_l - high_s + low_l - low_s is a product over four, in this order.
    rows = [
        g.to_f32(g.arange(count) * L),
        *(g.unsqueeze(v, 4) for v in (dt_CBLH, _exp(g, sum_CBLH), _exp(g, total_CB1H - sum_CBLH))),
        total_CBG1E,
        g.Concat(high_CBHL1, one_CBHL1, low_CBHL1, one_CBHL1, axis=4),
        g.Concat(one_CBHL1, -high_CBHL1, one_CBHL1, -low_CBHL1, axis=4),
    ]

    def group_first(v_BLGM: Value, width: int) -> Value:
        return g.reshape(v_BLGM, 0, 1, -1, width) if G == 1 else g.transpose(v_BLGM, 0, 2, 1, 3)

    def step(S_BGNE: Value, rows: Sequence[Value]) -> tuple[Value, Value]:
        first, dt_BLH1, since_BLH1, until_BLH1, total_BG1E, to_BHL4, from_BHL4 = rows
        # Tokens past the last one repeat it, with dt = 0.
        token_L = g.Min(l_L + g.int64(first), last)
        x_BLHP, B_BLGN, C_BLGN = (g.Gather(v, token_L, axis=1) for v in (x, B, C))
        x_BLHP = x_BLHP * dt_BLH1
        C_BGLN = group_first(C_BLGN, N)
        near_BGLL = g.microsoft("FusedMatMul", C_BGLN, group_first(B_BLGN, N), transB=1) * causal_LL
        decay_BHLL = g.Exp(g.Clip(g.microsoft("FusedMatMul", to_BHL4, from_BHL4, transB=1), -60.0, 0.0))
        if G == 1:
            near_BHLL = near_BGLL * decay_BHLL
        else:
            near_BHLL = g.reshape(g.unsqueeze(near_BGLL, 2) * g.reshape(decay_BHLL, 0, G, Q, L, L), 0, H, L, L)
        near_BLHP = g.transpose(near_BHLL @ g.transpose(x_BLHP, 0, 2, 1, 3), 0, 2, 1, 3)
        far_BGLE = C_BGLN @ S_BGNE
        far_BLGE = far_BGLE if G == 1 else g.transpose(far_BGLE, 0, 2, 1, 3)
        y_BLHP = near_BLHP + g.reshape(far_BLGE, -1, L, H, P) * since_BLH1
        x_BGLE = group_first(g.reshape(x_BLHP * until_BLH1, 0, 0, G, E), E)
        return S_BGNE * total_BG1E + g.transpose(B_BLGN, 0, 2, 3, 1) @ x_BGLE, y_BLHP

    state_BGNE = g.transpose(g.reshape(state, 0, G, E, N), 0, 1, 3, 2)
    after_BGNE, y_CBLHP = g.scan(state_BGNE, rows, FLOAT, step)
    # One copy in place of the two that a transpose and a slice make.
    t_T = g.arange(T)
    row_BT = (t_T / L * batch + g.unsqueeze(g.arange(batch), 1)) * L + g.Mod(t_T, L)
    y_BTHP = g.Gather(g.reshape(y_CBLHP, -1, H, P), row_BT, axis=0)
    return y_BTHP, g.reshape(g.transpose(after_BGNE, 0, 1, 3, 2), 0, H, P, N)


def _exp(g: Body, x: Value) -> Value:
    """exp of a double log decay in float32, at least 1e-26: a product with a denormal takes several times as long."""
    return g.Exp(g.Clip(g.Cast(x, to=FLOAT), -60.0, 0.0))


def _chunks(g: Body, one: dict[str, Any], x: Value, dt: Value, A_H: Value, B: Value, C: Value, state: Value) -> tuple[Value, Value]:
    H, G, P, N = one["num_heads"], one["num_groups"], one["head_dim"], one["state_dim"]
    Q = H // G
    T = g.dim(x, 1)
    L = g.Min(T, [CHUNK])
    count = (T + L - 1) / L
    missing = count * L - T

    def cut(v: Value, heads: tuple[int, ...], width: int) -> Value:
        """[B, T, heads.., width] padded with zeros (dt = 0 adds nothing) -> [B, heads.., C, L, width]."""
        n = len(heads)
        padded = g.Pad(v, g.shape(0, missing), 0.0, [1])
        cut = g.reshape(padded, 0, count, L, *heads, width)
        return g.transpose(cut, 0, *range(3, 3 + n), 1, 2, 3 + n)

    dt_BGQCL1 = cut(dt, (G, Q), 1)
    x_BGQCLP = cut(x, (G, Q), P) * dt_BGQCL1
    B_BGQCLN, C_BGQCLN = cut(B, (G, 1), N), cut(C, (G, 1), N)
    a_BGQCL1 = dt_BGQCL1 * g.reshape(A_H, G, Q, 1, 1, 1)
    before_CL, total_BGQC1, decay_BGQCLL = _decays(g, a_BGQCL1, L)

    # Inside a chunk.
    near_BGQCLL = (C_BGQCLN @ g.transpose(B_BGQCLN, 0, 1, 2, 3, 5, 4)) * decay_BGQCLL
    # To the chunk's end: the last row of the decay matrix.
    end_BGQCL1 = g.transpose(g.slice(decay_BGQCLL, -1, 2**62, 4), 0, 1, 2, 3, 5, 4)
    made_BGQCPN = g.transpose(x_BGQCLP * end_BGQCL1, 0, 1, 2, 3, 5, 4) @ B_BGQCLN

    # Over chunks: row c of `carried` is the state before chunk c, the last row the state after the call.
    first_BH1E = g.reshape(state, 0, H, 1, P * N)
    all_BHCE = g.Concat(first_BH1E, g.reshape(made_BGQCPN, 0, H, -1, P * N), axis=2)
    steps_BHC1 = g.Pad(g.reshape(total_BGQC1, 0, H, -1, 1), [1, 0], 0.0, [2])
    carry_BHCC = _segment_decay(g, steps_BHC1, count + 1)
    carried_BHCE = carry_BHCC @ all_BHCE
    next_BHPN = g.reshape(g.slice(carried_BHCE, -1, 2**62, 2), 0, H, P, N)
    start_BGQCPN = g.reshape(g.slice(carried_BHCE, 0, -1, 2), 0, G, Q, count, P, N)

    far_BGQCLP = (C_BGQCLN @ g.transpose(start_BGQCPN, 0, 1, 2, 3, 5, 4)) * before_CL
    y_BGQCLP = near_BGQCLL @ x_BGQCLP + far_BGQCLP
    y_BTHP = g.reshape(g.transpose(y_BGQCLP, 0, 3, 4, 1, 2, 5), 0, -1, H, P)
    return g.slice(y_BTHP, 0, T, 1), next_BHPN


def _decays(g: Body, a_BGQCL1: Value, L: Value) -> tuple[Value, Value, Value]:
    """exp(a_0 + .. + a_l), the log decay over the chunk, and exp(seg[l, s])."""
    cumulative_BGQCL1 = g.CumSum(a_BGQCL1, 4)
    total_BGQC1 = g.Squeeze(g.slice(cumulative_BGQCL1, -1, 2**62, 4), [4])
    return g.Exp(cumulative_BGQCL1), total_BGQC1, _segment_decay(g, a_BGQCL1, L)


def _segment_decay(g: Body, a_L1: Value, L: Value) -> Value:
    """exp(seg[l, s]) on and below the diagonal, 0 above.

    The sum runs down each column from s + 1: a difference of two long sums would lose the small segments after a large one.
    """
    l_L = g.arange(L)
    after_LL = g.unsqueeze(l_L, 1) > g.unsqueeze(l_L, 0)
    seg_LL = g.CumSum(g.Where(after_LL, a_L1, 0.0), -2)
    return g.Exp(g.Where(g.unsqueeze(l_L, 1) >= g.unsqueeze(l_L, 0), seg_LL, g.constant(np.asarray(-np.inf, np.float32))))
