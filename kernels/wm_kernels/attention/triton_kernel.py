"""Attention over contiguous cells: many queries at once, or few queries with the cells split among programs; writing cells.

B batch   T tokens   H query heads   K kv heads   G = H/K   A score heads   P head dimension   N cells of a tile
R rows of a tile: queries by heads, so that the heads that share keys share their loads
"""

import triton
import triton.language as tl


@triton.jit
def fold(acc_RP, best_R, total_R, logit_RN, v_NP):
    """One tile of online softmax; logits are in powers of 2, -inf is a key that is not seen."""
    new_best_R = tl.maximum(best_R, tl.max(logit_RN, 1))
    # A row that has seen no key must not compute -inf - (-inf).
    base_R = tl.where(new_best_R == float("-inf"), 0.0, new_best_R)
    weight_RN = tl.exp2(logit_RN - base_R[:, None])
    fade_R = tl.exp2(best_R - base_R)
    if v_NP.dtype == tl.float32:
        # Summed by tile first: one long sum of float32 products in order would lose bits.
        acc_RP = acc_RP * fade_R[:, None] + tl.dot(weight_RN, v_NP, input_precision="ieee")
    else:
        acc_RP = tl.dot(weight_RN.to(v_NP.dtype), v_NP, acc_RP * fade_R[:, None])
    return acc_RP, new_best_R, total_R * fade_R + tl.sum(weight_RN, 1)


@triton.jit
def load_rows(base, row, stride, ok, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows of P elements, zeros where a row is not `ok`."""
    p_P = tl.arange(0, BLOCK_P)
    at = base + row.to(tl.int64)[:, None] * stride + p_P[None, :]
    if P == BLOCK_P:
        return tl.load(at, mask=ok[:, None], other=0.0)
    else:
        return tl.load(at, mask=ok[:, None] & (p_P < P)[None, :], other=0.0)


@triton.jit
def normalized(acc_RP, total_R):
    """Zeros for a row that has seen no key."""
    return acc_RP / tl.where(total_R == 0.0, 1.0, total_R)[:, None]


@triton.jit
def _fold_cells(
    acc_RP, best_R, total_R, q_RP, k, v, score, score_row_R, last_R, start, end, k_n, v_n, score_n,
    SCALE: tl.constexpr, SCORING: tl.constexpr, PER_ROW: tl.constexpr, MASKED: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cells start .. end - 1; unless MASKED, all of them are seen by every row and fill whole tiles."""
    LOG2E: tl.constexpr = 1.4426950408889634
    p_P = tl.arange(0, BLOCK_P)
    for first in range(start, end, BLOCK_N):
        n_N = first + tl.arange(0, BLOCK_N)
        if MASKED:
            ok_N = n_N < end
            k_NP = load_rows(k, n_N, k_n, ok_N, P, BLOCK_P)
            v_NP = load_rows(v, n_N, v_n, ok_N, P, BLOCK_P)
        elif P == BLOCK_P:
            k_NP = tl.load(k + n_N.to(tl.int64)[:, None] * k_n + p_P[None, :])
            v_NP = tl.load(v + n_N.to(tl.int64)[:, None] * v_n + p_P[None, :])
        else:
            k_NP = tl.load(k + n_N.to(tl.int64)[:, None] * k_n + p_P[None, :], mask=(p_P < P)[None, :], other=0.0)
            v_NP = tl.load(v + n_N.to(tl.int64)[:, None] * v_n + p_P[None, :], mask=(p_P < P)[None, :], other=0.0)
        logit_RN = tl.dot(q_RP, tl.trans(k_NP), input_precision="ieee") * (SCALE * LOG2E)
        if SCORING != "none":
            if PER_ROW:
                score_RN = tl.load(score + score_row_R[:, None] + n_N.to(tl.int64)[None, :] * score_n, mask=(n_N < end)[None, :], other=0.0)
            else:
                score_RN = tl.load(score + n_N.to(tl.int64) * score_n, mask=n_N < end, other=0.0)[None, :]
            if SCORING == "binary":
                logit_RN += tl.where(score_RN >= 1.0, 0.0, float("-inf"))
            else:
                logit_RN += score_RN * LOG2E
        if MASKED:
            logit_RN = tl.where((n_N[None, :] <= last_R[:, None]) & ok_N[None, :], logit_RN, float("-inf"))
        acc_RP, best_R, total_R = fold(acc_RP, best_R, total_R, logit_RN, v_NP)
    return acc_RP, best_R, total_R


@triton.jit(do_not_specialize=["T", "L"])
def attend_cells(
    q, k, v, score, position, out,
    q_b, q_t, q_h, k_b, k_n, k_k, v_b, v_n, v_k, score_b, score_a, score_n, T, L,
    H: tl.constexpr, K: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, SCORING: tl.constexpr, HAS_POSITION: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of HEADS heads of one kv head; query t sees cells 0 .. position + t.

    Grid: (ceil(T / QUERIES), K * ceil(G / HEADS), B).
    """
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + HEADS - 1) // HEADS
    # The last queries see the most cells: they start first.
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    b = tl.program_id(2).to(tl.int64)
    kv = tl.program_id(1) // PARTS
    row_R = tl.arange(0, BLOCK_R)
    t_R = t0 + row_R // HEADS
    g_R = tl.program_id(1) % PARTS * HEADS + row_R % HEADS
    ok_R = (row_R < QUERIES * HEADS) & (t_R < T) & (g_R < G)
    h_R = kv * G + tl.minimum(g_R, G - 1)
    seen = 0
    if HAS_POSITION:
        seen = tl.load(position + b).to(tl.int32)
    last_R = seen + t_R
    kv64 = kv.to(tl.int64)
    k += b * k_b + kv64 * k_k
    v += b * v_b + kv64 * v_k
    score += b * score_b
    PER_ROW: tl.constexpr = (A > K) or (K % A != 0)
    score_row_R = h_R.to(tl.int64) // (H // A) * score_a
    if not PER_ROW:
        score += kv64 // (K // A) * score_a

    q_RP = load_rows(q + b * q_b + h_R.to(tl.int64)[:, None] * q_h, t_R, q_t, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    end = tl.minimum(L, seen + tl.minimum(T, t0 + QUERIES))
    whole = tl.minimum(end, seen + t0 + 1) // BLOCK_N * BLOCK_N
    acc_RP, best_R, total_R = _fold_cells(
        acc_RP, best_R, total_R, q_RP, k, v, score, score_row_R, last_R, 0, whole, k_n, v_n, score_n, SCALE, SCORING, PER_ROW, False, P,
        BLOCK_P, BLOCK_N
    )  # fmt: skip
    acc_RP, best_R, total_R = _fold_cells(
        acc_RP, best_R, total_R, q_RP, k, v, score, score_row_R, last_R, whole, end, k_n, v_n, score_n, SCALE, SCORING, PER_ROW, True, P,
        BLOCK_P, BLOCK_N
    )  # fmt: skip
    store_rows(out, normalized(acc_RP, total_R), b, t_R, h_R, ok_R, T, H, P, BLOCK_P)


@triton.jit
def store_rows(out, value_RP, b, t_R, h_R, ok_R, T, H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows into a contiguous out_BTHP."""
    p_P = tl.arange(0, BLOCK_P)
    at = out + ((b * T + t_R) * H + h_R)[:, None] * P + p_P[None, :]
    tl.store(at, value_RP.to(out.dtype.element_ty), mask=ok_R[:, None] & (p_P < P)[None, :])


@triton.jit(do_not_specialize=["T", "L"])
def attend_some_cells(
    q, k, v, score, position, acc, tops,
    q_b, q_t, q_h, k_b, k_n, k_k, v_b, v_n, v_k, score_b, score_a, score_n, T, L,
    H: tl.constexpr, K: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, SCORING: tl.constexpr,
):  # fmt: skip
    """All queries of one kv head against one share of the cells in use: a partial softmax. Grid: (shares, K, B); T * G <= BLOCK_R.

    acc is [B, K, shares, BLOCK_R, P], tops [B, K, shares, 2, BLOCK_R]: the largest logit and the sum of weights.
    """
    G: tl.constexpr = H // K
    share, shares = tl.program_id(0), tl.num_programs(0)
    kv = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row_R = tl.arange(0, BLOCK_R)
    t_R = row_R // G
    h_R = kv * G + row_R % G
    ok_R = t_R < T
    seen = tl.load(position + b).to(tl.int32)
    used = tl.minimum(L, seen + T)
    each = tl.cdiv(tl.cdiv(used, BLOCK_N), shares) * BLOCK_N
    start = share * each
    end = tl.minimum(used, start + each)
    k += b * k_b + kv * k_k
    v += b * v_b + kv * v_k
    score += b * score_b
    PER_ROW: tl.constexpr = (A > K) or (K % A != 0)
    score_row_R = h_R // (H // A) * score_a
    if not PER_ROW:
        score += kv // (K // A) * score_a
    q_RP = load_rows(q + b * q_b + h_R.to(tl.int64)[:, None] * q_h, t_R, q_t, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    acc_RP, best_R, total_R = _fold_cells(
        acc_RP, best_R, total_R, q_RP, k, v, score, score_row_R, seen + t_R, start, end, k_n, v_n, score_n, SCALE, SCORING, PER_ROW, True,
        P, BLOCK_P, BLOCK_N
    )  # fmt: skip
    store_partial(acc, tops, acc_RP, best_R, total_R, (b * K + kv) * shares + share, T * G, P, BLOCK_P, BLOCK_R)


@triton.jit
def store_partial(acc, tops, acc_RP, best_R, total_R, place, rows, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    """The first `rows` rows of one share's partial softmax; `place` is its number among all."""
    row_R = tl.arange(0, BLOCK_R)
    p_P = tl.arange(0, BLOCK_P)
    tl.store(acc + (place * BLOCK_R + row_R)[:, None] * P + p_P[None, :], acc_RP, mask=(row_R < rows)[:, None] & (p_P < P)[None, :])
    tl.store(tops + place * 2 * BLOCK_R + row_R, best_R, mask=row_R < rows)
    tl.store(tops + (place * 2 + 1) * BLOCK_R + row_R, total_R, mask=row_R < rows)


@triton.jit
def combined(acc, tops, row, group, SHARES: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    """One row's softmax from its shares, in the order of the shares; `group` is its number among those of (b, kv head)."""
    share_S = tl.arange(0, SHARES)
    p_P = tl.arange(0, BLOCK_P)
    place_S = group * SHARES + share_S
    best_S = tl.load(tops + place_S * 2 * BLOCK_R + row)
    total_S = tl.load(tops + (place_S * 2 + 1) * BLOCK_R + row)
    best = tl.max(best_S, 0)
    fade_S = tl.exp2(best_S - tl.where(best == float("-inf"), 0.0, best))
    acc_SP = tl.load(acc + (place_S * BLOCK_R + row)[:, None] * P + p_P[None, :], mask=(p_P < P)[None, :], other=0.0)
    total = tl.sum(total_S * fade_S, 0)
    return tl.sum(acc_SP * fade_S[:, None], 0) / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["T"])
def combine_shares(
    acc, tops, out, T,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """The rows of `attend_some_cells`. Grid: (T, H, B)."""
    G: tl.constexpr = H // K
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    value_P = combined(acc, tops, t * G + h % G, b * K + h // G, SHARES, P, BLOCK_P, BLOCK_R)
    p_P = tl.arange(0, BLOCK_P)
    tl.store(out + ((b * T + t) * H + h) * P + p_P, value_P.to(out.dtype.element_ty), mask=p_P < P)


@triton.jit(do_not_specialize=["T", "L"])
def write_cells(
    new_k, new_v, k, v, position,
    new_k_b, new_k_t, new_k_k, new_v_b, new_v_t, new_v_k, k_b, k_n, k_k, v_b, v_n, v_k, T, L,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Token t's keys and values into cell position + t, where there is one. Grid: (ceil(T / BLOCK_T), K, B)."""
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    cell_T = tl.load(position + b) + t_T
    ok_T = (t_T < T) & (cell_T >= 0) & (cell_T < L)
    k_TP = load_rows(new_k + b * new_k_b + kv * new_k_k, t_T, new_k_t, ok_T, P, BLOCK_P)
    v_TP = load_rows(new_v + b * new_v_b + kv * new_v_k, t_T, new_v_t, ok_T, P, BLOCK_P)
    p_P = tl.arange(0, BLOCK_P)
    ok_TP = ok_T[:, None] & (p_P < P)[None, :]
    tl.store(k + b * k_b + kv * k_k + cell_T[:, None] * k_n + p_P[None, :], k_TP, mask=ok_TP)
    tl.store(v + b * v_b + kv * v_k + cell_T[:, None] * v_n + p_P[None, :], v_TP, mask=ok_TP)
