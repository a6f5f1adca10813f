"""Keep-window attention whose bits do not depend on how tokens are split into calls.

Each token replaces the worst slot, one after the other, as steps would; then every query reads the slots in their order, in spans of one
size and tiles of one shape, by the one kernel that serves every number of tokens. A single token has a program for each span.

B batch   T tokens   H query heads   K kv heads   G = H/K   P head dimension   W window   N slots of a tile   R rows of a tile: query heads
Candidates 0 .. W - 1 are the slots before the call, W + t is token t.
"""

import triton
import triton.language as tl

from wm_kernels.attention.triton_exact import fades, joined
from wm_kernels.attention.triton_kernel import fold, load_rows, normalized
from wm_kernels.keep_window_attention.triton_kernel import put
from wm_kernels.keep_window_attention.triton_select import rank_of


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def choose_slots(
    score, slot_score, slot_position, position, valid, place, holder,
    score_b, score_t, score_k, slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k, slot_position_w, T, CHUNKS,
    K: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, CHUNK: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """The slot that each token takes, or -1, and the candidates in the slots before each chunk and after the last. Grid: (K, B).

    place is [B, K, T], holder [B, K, CHUNKS + 1, W].
    """
    b, kv = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    score += b * score_b + kv * score_k
    place += (b * K + kv) * T
    holder += (b * K + kv) * (CHUNKS + 1) * W
    w_W = tl.arange(0, BLOCK_W)
    inside_W = w_W < W
    # Empty slots are below every key, and the first of them lowest.
    rank_W = tl.where(inside_W, w_W.to(tl.int64), 9223372036854775807)
    count, first = T, tl.full((), 0, tl.int64)
    if HAS_VALID:
        count = tl.minimum(T, tl.load(valid + b)).to(tl.int32)
    if HAS_SLOTS:
        first = tl.load(position + b)
        slot_score += b * slot_score_b + kv * slot_score_k
        slot_position += b * slot_position_b + kv * slot_position_k
        found_W = rank_of(
            tl.load(slot_score + w_W * slot_score_w, mask=inside_W, other=0.0),
            tl.load(slot_position + w_W * slot_position_w, mask=inside_W, other=-1),
        )
        rank_W = tl.where(found_W > 0, found_W, rank_W)
    held_W = w_W
    next_score = tl.load(score, mask=T > 0, other=0.0)
    for t in range(0, T):
        if t % CHUNK == 0:
            tl.store(holder + t // CHUNK * W + w_W, held_W, mask=inside_W)
        new_score = next_score
        next_score = tl.load(score + tl.minimum(t + 1, T - 1).to(tl.int64) * score_t)
        rank = rank_of(new_score, first + t)
        lowest = tl.min(rank_W, 0)
        wins = (rank > lowest) & (t < count) & (new_score == new_score)
        takes_W = (rank_W == lowest) & wins
        tl.store(place + t, tl.max(tl.where(takes_W, w_W, -1), 0))
        rank_W = tl.where(takes_W, rank, rank_W)
        held_W = tl.where(takes_W, W + t, held_W)
    tl.store(holder + CHUNKS * W + w_W, held_W, mask=inside_W)


@triton.jit
def _rows(slots, tokens, index_N, slot_w, token_t, ok_N, W: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """Rows of candidates, zeros where not `ok`."""
    p_P = tl.arange(0, BLOCK_P)
    at = tokens + (index_N - W).to(tl.int64)[:, None] * token_t + p_P[None, :]
    if HAS_SLOTS:
        at = tl.where((index_N < W)[:, None], slots + index_N.to(tl.int64)[:, None] * slot_w + p_P[None, :], at)
    if P == BLOCK_P:
        return tl.load(at, mask=ok_N[:, None], other=0.0)
    else:
        return tl.load(at, mask=ok_N[:, None] & (p_P < P)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def attend_in_slot_order(
    q, k, v, score, slot_k, slot_v, slot_score, place, holder, acc, tops, out,
    q_b, q_t, q_h, k_b, k_t, k_k, v_b, v_t, v_k, score_b, score_t, score_k, slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w,
    slot_score_b, slot_score_k, slot_score_w, T, CHUNKS,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr, CHUNK: tl.constexpr, HAS_SLOTS: tl.constexpr, SCALE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One token's heads of one kv head over the slots as that token leaves them, a span of SPAN slots after the other.

    Grid: (T, K, B), or, APART, with T = 1, (spans, K, B): acc_BHSP and tops_BHS2, S spans, then get each span's sums, and largest logit and
    sum of weights.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    G: tl.constexpr = H // K
    SPANS: tl.constexpr = (W + SPAN - 1) // SPAN
    t, from_span, to_span = tl.program_id(0), 0, SPANS
    if APART:
        t, from_span, to_span = 0, tl.program_id(0), tl.program_id(0) + 1
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    chunk = t // CHUNK
    k += b * k_b + kv * k_k
    v += b * v_b + kv * v_k
    score += b * score_b + kv * score_k
    slot_k += b * slot_k_b + kv * slot_k_k
    slot_v += b * slot_v_b + kv * slot_v_k
    slot_score += b * slot_score_b + kv * slot_score_k
    holder += ((b * K + kv) * (CHUNKS + 1) + chunk) * W
    # The chunk's tokens up to this one, and the slots that they have taken.
    token_C = chunk * CHUNK + tl.arange(0, CHUNK)
    place_C = tl.load(place + (b * K + kv) * T + token_C, mask=token_C <= t, other=-1)

    row_R = tl.arange(0, BLOCK_R)
    p_P = tl.arange(0, BLOCK_P)
    h_R = kv * G + row_R
    ok_R = row_R < G
    q_RP = load_rows(q + b * q_b + tl.cast(t, tl.int64) * q_t, h_R, q_h, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    lane_N = tl.arange(0, BLOCK_N)
    for span in range(from_span, to_span):
        next_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        next_best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        next_total_R = tl.zeros((BLOCK_R,), tl.float32)
        for n in range(span * SPAN, tl.minimum(W, span * SPAN + SPAN), BLOCK_N):
            w_N = n + lane_N
            ok_N = w_N < W
            held_N = tl.load(holder + w_N, mask=ok_N, other=0)
            taken_N = tl.max(tl.where(place_C[None, :] == w_N[:, None], token_C[None, :], -1), 1)
            index_N = tl.where(taken_N >= 0, W + taken_N, held_N)
            is_token_N = ok_N & (index_N >= W)
            bias_N = tl.load(score + (index_N - W).to(tl.int64) * score_t, mask=is_token_N, other=float("-inf"))
            if HAS_SLOTS:
                was_N = tl.load(slot_score + index_N * slot_score_w, mask=ok_N & (index_N < W), other=float("-inf"))
                bias_N = tl.where(is_token_N, bias_N, was_N)
            else:
                ok_N = is_token_N
            k_NP = _rows(slot_k, k, index_N, slot_k_w, k_t, ok_N, W, P, BLOCK_P, HAS_SLOTS)
            v_NP = _rows(slot_v, v, index_N, slot_v_w, v_t, ok_N, W, P, BLOCK_P, HAS_SLOTS)
            logit_RN = tl.dot(q_RP, tl.trans(k_NP), input_precision="ieee") * (SCALE * LOG2E) + (bias_N * LOG2E)[None, :]
            next_RP, next_best_R, next_total_R = fold(next_RP, next_best_R, next_total_R, logit_RN, v_NP)
        if APART:
            acc_RP, best_R, total_R = next_RP, next_best_R, next_total_R
        else:
            best_R, fade_R, next_fade_R = fades(best_R, next_best_R)
            acc_RP = joined(acc_RP, fade_R[:, None], next_RP, next_fade_R[:, None])
            total_R = joined(total_R, fade_R, next_total_R, next_fade_R)
    if APART:
        to_R = (b * H + h_R) * SPANS + from_span
        tl.store(acc + to_R[:, None] * P + p_P[None, :], acc_RP, mask=ok_R[:, None] & (p_P < P)[None, :])
        tl.store(tops + to_R * 2, best_R, mask=ok_R)
        tl.store(tops + to_R * 2 + 1, total_R, mask=ok_R)
    else:
        at = out + ((b * T + t) * H + h_R)[:, None] * P + p_P[None, :]
        tl.store(at, normalized(acc_RP, total_R).to(out.dtype.element_ty), mask=ok_R[:, None] & (p_P < P)[None, :])


@triton.jit
def join_spans_and_take_slot(
    k, v, score, slot_k, slot_v, slot_score, slot_position, position, place, acc, tops, out,
    k_b, k_k, v_b, v_k, score_b, score_k, slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w,
    slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k, slot_position_w,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, SPANS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """One head of the token from its spans, by the arithmetic of `attend_in_slot_order`; the slot that the token takes. Grid: (H, B)."""
    G: tl.constexpr = H // K
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_P = tl.arange(0, BLOCK_P)
    acc_P = tl.zeros((BLOCK_P,), tl.float32)
    best, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for span in range(0, SPANS):
        at = (b * H + h) * SPANS + span
        next_P = tl.load(acc + at * P + p_P, mask=p_P < P, other=0.0)
        next_total = tl.load(tops + at * 2 + 1)
        best, fade, next_fade = fades(best, tl.load(tops + at * 2))
        acc_P = joined(acc_P, fade, next_P, next_fade)
        total = joined(total, fade, next_total, next_fade)
    value_P = acc_P / tl.where(total == 0.0, 1.0, total)
    tl.store(out + (b * H + h) * P + p_P, value_P.to(out.dtype.element_ty), mask=p_P < P)
    if HAS_SLOTS:
        kv = (h // G).to(tl.int64)
        at_slot = tl.load(place + b * K + kv)
        put(
            k + b * k_b + kv * k_k, v + b * v_b + kv * v_k, score + b * score_b + kv * score_k, slot_k + b * slot_k_b + kv * slot_k_k,
            slot_v + b * slot_v_b + kv * slot_v_k, slot_score + b * slot_score_b + kv * slot_score_k,
            slot_position + b * slot_position_b + kv * slot_position_k, at_slot, (at_slot >= 0) & (h % G == 0), tl.load(position + b),
            slot_k_w, slot_v_w, slot_score_w, slot_position_w, P, BLOCK_P
        )  # fmt: skip


@triton.jit(do_not_specialize=["CHUNKS"])
def take_slots(
    k, v, score, slot_k, slot_v, slot_score, slot_position, position, holder,
    k_b, k_t, k_k, v_b, v_t, v_k, score_b, score_t, score_k,
    slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w, slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k,
    slot_position_w, CHUNKS,
    K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the tokens that hold a slot after the call into it. Grid: (ceil(W / BLOCK), K, B)."""
    b, kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    w = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(holder + ((b * K + kv) * (CHUNKS + 1) + CHUNKS) * W + w, mask=w < W, other=0)
    new = (w < W) & (held >= W)
    t = (held - W).to(tl.int64)
    p_P = tl.arange(0, BLOCK_P)
    ok = new[:, None] & (p_P < P)[None, :]
    to = w.to(tl.int64)[:, None]
    new_k = load_rows(k + b * k_b + kv * k_k, t, k_t, new, P, BLOCK_P)
    tl.store(slot_k + b * slot_k_b + kv * slot_k_k + to * slot_k_w + p_P[None, :], new_k, mask=ok)
    new_v = load_rows(v + b * v_b + kv * v_k, t, v_t, new, P, BLOCK_P)
    tl.store(slot_v + b * slot_v_b + kv * slot_v_k + to * slot_v_w + p_P[None, :], new_v, mask=ok)
    new_score = tl.load(score + b * score_b + kv * score_k + t * score_t, mask=new, other=0.0)
    tl.store(slot_score + b * slot_score_b + kv * slot_score_k + w * slot_score_w, new_score, mask=new)
    tl.store(slot_position + b * slot_position_b + kv * slot_position_k + w * slot_position_w, tl.load(position + b) + t, mask=new)
