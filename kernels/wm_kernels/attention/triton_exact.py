"""Attention over contiguous cells whose bits do not depend on how tokens are split into calls.

Cells are cut into chunks of one size wherever a call begins; each gives a partial softmax by tiles of one shape, and these are joined from
the first to the last. Many tokens walk over the chunks; few have a program for each, and join them afterwards by the same arithmetic.

B batch   T tokens   H query heads   K kv heads   G = H/K   A score heads   P head dimension   N cells of a tile   C cells of a chunk
R rows of a tile: queries by heads
"""

import triton
import triton.language as tl

from wm_kernels.attention.triton_kernel import _fold_cells, load_rows, normalized, store_rows


@triton.jit
def fades(best, next_best):
    """The larger of two logits, and what weights relative to either are multiplied by to be relative to it."""
    top = tl.maximum(best, next_best)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.exp2(best - base), tl.exp2(next_best - base)


@triton.jit
def joined(x, fade, next_x, next_fade):
    """The fused product is named: a compiler that may choose between the two could choose differently in each kernel."""
    return tl.fma(x, fade, next_x * next_fade)


@triton.jit(do_not_specialize=["T", "L", "CHUNKS"])
def attend_chunks(
    q, k, v, score, position, acc, tops, out,
    q_b, q_t, q_h, k_b, k_n, k_k, v_b, v_n, v_k, score_b, score_a, score_n, T, L, CHUNKS,
    H: tl.constexpr, K: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr, SCORING: tl.constexpr,
    HAS_POSITION: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of HEADS heads of one kv head; query t sees cells 0 .. position + t.

    Grid: (ceil(T / QUERIES), K * ceil(G / HEADS), B), or, APART, with T <= QUERIES, (CHUNKS, K * ceil(G / HEADS), B): acc_BCTHP and
    tops_BCTH2 then get each chunk's sums, and largest logit and sum of weights.
    """
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + HEADS - 1) // HEADS
    t0, from_chunk = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES, 0
    if APART:
        t0, from_chunk = 0, tl.program_id(0)
    b, kv = tl.program_id(2).to(tl.int64), (tl.program_id(1) // PARTS).to(tl.int64)
    row_R = tl.arange(0, BLOCK_R)
    t_R = t0 + row_R // HEADS
    g_R = tl.program_id(1) % PARTS * HEADS + row_R % HEADS
    ok_R = (row_R < QUERIES * HEADS) & (t_R < T) & (g_R < G)
    h_R = kv * G + tl.minimum(g_R, G - 1)
    seen = 0
    if HAS_POSITION:
        seen = tl.load(position + b).to(tl.int32)
    k += b * k_b + kv * k_k
    v += b * v_b + kv * v_k
    score += b * score_b
    PER_ROW: tl.constexpr = (A > K) or (K % A != 0)
    score_row_R = h_R // (H // A) * score_a
    if not PER_ROW:
        score += kv // (K // A) * score_a

    q_RP = load_rows(q + b * q_b + h_R[:, None] * q_h, t_R, q_t, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    end = tl.minimum(L, seen + tl.minimum(T, t0 + QUERIES))
    to_chunk = tl.cdiv(end, CHUNK)
    if APART:
        to_chunk = tl.minimum(to_chunk, from_chunk + 1)
    for chunk in range(from_chunk, to_chunk):
        next_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        next_best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        next_total_R = tl.zeros((BLOCK_R,), tl.float32)
        next_RP, next_best_R, next_total_R = _fold_cells(
            next_RP, next_best_R, next_total_R, q_RP, k, v, score, score_row_R, seen + t_R, chunk * CHUNK,
            tl.minimum(end, chunk * CHUNK + CHUNK), k_n, v_n, score_n, SCALE, SCORING, PER_ROW, True, P, BLOCK_P, BLOCK_N
        )  # fmt: skip
        if APART:
            acc_RP, best_R, total_R = next_RP, next_best_R, next_total_R
        else:
            best_R, fade_R, next_fade_R = fades(best_R, next_best_R)
            acc_RP = joined(acc_RP, fade_R[:, None], next_RP, next_fade_R[:, None])
            total_R = joined(total_R, fade_R, next_total_R, next_fade_R)
    if APART:
        place_R = ((b * CHUNKS + from_chunk) * T + t_R) * H + h_R
        p_P = tl.arange(0, BLOCK_P)
        tl.store(acc + place_R[:, None] * P + p_P[None, :], acc_RP, mask=ok_R[:, None] & (p_P < P)[None, :])
        tl.store(tops + place_R * 2, best_R, mask=ok_R)
        tl.store(tops + place_R * 2 + 1, total_R, mask=ok_R)
    else:
        store_rows(out, normalized(acc_RP, total_R), b, t_R, h_R, ok_R, T, H, P, BLOCK_P)


@triton.jit(do_not_specialize=["T", "L", "CHUNKS"])
def join_chunks(
    acc, tops, position, out, T, L, CHUNKS, H: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The rows of `attend_chunks` from its chunks. Grid: (T, H, B)."""
    t, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_P = tl.arange(0, BLOCK_P)
    acc_P = tl.zeros((BLOCK_P,), tl.float32)
    best, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for chunk in range(0, tl.cdiv(tl.minimum(L, tl.load(position + b).to(tl.int32) + T), CHUNK)):
        place = ((b * CHUNKS + chunk) * T + t) * H + h
        next_P = tl.load(acc + place * P + p_P, mask=p_P < P, other=0.0)
        next_total = tl.load(tops + place * 2 + 1)
        best, fade, next_fade = fades(best, tl.load(tops + place * 2))
        acc_P = joined(acc_P, fade, next_P, next_fade)
        total = joined(total, fade, next_total, next_fade)
    value_P = acc_P / tl.where(total == 0.0, 1.0, total)
    tl.store(out + ((b * T + t) * H + h) * P + p_P, value_P.to(out.dtype.element_ty), mask=p_P < P)
