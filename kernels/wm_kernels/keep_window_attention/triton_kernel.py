"""Keep-window attention: many queries over lists of live keys, the slots after them, and the step of one token.

B batch   T tokens   H query heads   K kv heads   G = H/K   P head dimension   W slots, or window   S slots given, W or 0
N keys of a tile   R rows of a tile: queries by heads, so that the heads that share keys share their loads
E entries of a list for keys that only some of its queries see
"""

import triton
import triton.language as tl

from wm_kernels.attention.triton_kernel import combined, fold, load_rows, normalized, store_partial, store_rows
from wm_kernels.keep_window_attention.triton_select import rank_of
from wm_kernels.triton_early import wait_for_predecessor


@triton.jit
def _gather(slots, tokens, index_N, slot_w, token_t, S: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Rows of candidates, from the slots or from the tokens."""
    p_P = tl.arange(0, BLOCK_P)
    t_N = (index_N - S).to(tl.int64)
    at = tokens + t_N[:, None] * token_t + p_P[None, :]
    if S > 0:
        at = tl.where((index_N < S)[:, None], slots + index_N.to(tl.int64)[:, None] * slot_w + p_P[None, :], at)
    if P == BLOCK_P:
        return tl.load(at)
    else:
        return tl.load(at, mask=(p_P < P)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def attend_listed(
    q, k, v, slot_k, slot_v, entry, bias, leaves, count, out,
    q_b, q_t, q_h, k_b, k_t, k_k, v_b, v_t, v_k, slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w, T, BLOCKS,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, LISTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of HEADS heads of one kv head over the list of their block. Grid: (ceil(T / QUERIES), K * ceil(G / HEADS), B)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + HEADS - 1) // HEADS
    E: tl.constexpr = 2 * LISTED
    EACH: tl.constexpr = E + (W + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    t0 = tl.program_id(0) * QUERIES
    b = tl.program_id(2).to(tl.int64)
    kv = (tl.program_id(1) // PARTS).to(tl.int64)
    block = t0 // LISTED
    row_R = tl.arange(0, BLOCK_R)
    t_R = t0 + row_R // HEADS
    g_R = tl.program_id(1) % PARTS * HEADS + row_R % HEADS
    ok_R = (row_R < QUERIES * HEADS) & (t_R < T) & (g_R < G)
    h_R = kv * G + tl.minimum(g_R, G - 1)
    at = (b * K + kv) * BLOCKS + block
    entry += at * EACH
    bias += at * EACH
    leaves += at * E
    n_part, n_whole = tl.load(count + at * 2), tl.load(count + at * 2 + 1)
    k += b * k_b + kv * k_k
    v += b * v_b + kv * v_k
    slot_k += b * slot_k_b + kv * slot_k_k
    slot_v += b * slot_v_b + kv * slot_v_k

    q_RP = load_rows(q + b * q_b + h_R[:, None] * q_h, t_R, q_t, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    lane_N = tl.arange(0, BLOCK_N)
    for n in tl.range(0, n_part, BLOCK_N, num_stages=1):
        ok_N = n + lane_N < n_part
        index_N = tl.load(entry + n + lane_N, mask=ok_N, other=S + block * LISTED)
        bias_N = tl.load(bias + n + lane_N, mask=ok_N, other=float("-inf"))
        leaves_N = tl.load(leaves + n + lane_N, mask=ok_N, other=0) + block * LISTED
        k_NP = _gather(slot_k, k, index_N, slot_k_w, k_t, S, P, BLOCK_P)
        v_NP = _gather(slot_v, v, index_N, slot_v_w, v_t, S, P, BLOCK_P)
        logit_RN = tl.dot(q_RP, tl.trans(k_NP), input_precision="ieee") * (SCALE * LOG2E) + bias_N[None, :]
        seen_RN = (index_N[None, :] - S <= t_R[:, None]) & (t_R[:, None] < leaves_N[None, :])
        acc_RP, best_R, total_R = fold(acc_RP, best_R, total_R, tl.where(seen_RN, logit_RN, float("-inf")), v_NP)
    for n in tl.range(0, n_whole, BLOCK_N, num_stages=STAGES):
        index_N = tl.load(entry + E + n + lane_N)
        bias_N = tl.load(bias + E + n + lane_N)
        k_NP = _gather(slot_k, k, index_N, slot_k_w, k_t, S, P, BLOCK_P)
        v_NP = _gather(slot_v, v, index_N, slot_v_w, v_t, S, P, BLOCK_P)
        logit_RN = tl.dot(q_RP, tl.trans(k_NP), input_precision="ieee") * (SCALE * LOG2E) + bias_N[None, :]
        acc_RP, best_R, total_R = fold(acc_RP, best_R, total_R, logit_RN, v_NP)
    store_rows(out, normalized(acc_RP, total_R), b, t_R, h_R, ok_R, T, H, P, BLOCK_P)


@triton.jit(do_not_specialize=["C", "CHUNKS"])
def refill_slots(
    k, v, score, slot_k, slot_v, slot_score, slot_position, position, rank, live, live_count, threshold, new_k, new_v, new_score,
    new_position,
    k_b, k_t, k_k, v_b, v_t, v_k, score_b, score_t, score_k,
    slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w, slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k,
    slot_position_w, new_k_b, new_k_k, new_k_w, new_v_b, new_v_k, new_v_w, new_score_b, new_score_k, new_score_w, new_position_b,
    new_position_k, new_position_w, C, CHUNKS,
    K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots after the call: those kept stay where they are, the others take the kept tokens in order. Grid: (ceil(W / BLOCK), K, B)."""
    b, kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * K + kv
    at_end = row * (CHUNKS + 1) + CHUNKS
    least = tl.load(threshold + at_end)
    n_live = tl.load(live_count + at_end)
    rank += row * C
    lane = tl.arange(0, BLOCK)
    w = tl.program_id(0) * BLOCK + lane
    stay, free_before = 0, 0
    for n in range(0, W, BLOCK):
        stays = (tl.load(rank + n + lane, mask=n + lane < W, other=0) >= least).to(tl.int32)
        stay += tl.sum(stays, 0)
        free_before += tl.where(n < tl.program_id(0) * BLOCK, BLOCK - tl.sum(stays, 0), 0)
    kept = tl.load(rank + w, mask=w < W, other=0) >= least
    free = (w < W) & (kept == 0)
    n_th = stay + free_before + tl.cumsum(free.to(tl.int32), 0) - 1
    filled = free & (n_th < n_live)
    t = (tl.load(live + at_end * W + n_th, mask=filled, other=W) - W).to(tl.int64)
    new_k += b * new_k_b + kv * new_k_k
    new_v += b * new_v_b + kv * new_v_k
    new_score += b * new_score_b + kv * new_score_k + w * new_score_w
    new_position += b * new_position_b + kv * new_position_k + w * new_position_w
    write = free
    values_k = load_rows(k + b * k_b + kv * k_k, t, k_t, filled, P, BLOCK_P)
    values_v = load_rows(v + b * v_b + kv * v_k, t, v_t, filled, P, BLOCK_P)
    scores = tl.load(score + b * score_b + kv * score_k + t * score_t, mask=filled, other=float("-inf"))
    positions = tl.where(filled, tl.load(position + b) + t, -1)
    if not IN_PLACE:
        write = w < W
        slot_score += b * slot_score_b + kv * slot_score_k + w * slot_score_w
        slot_position += b * slot_position_b + kv * slot_position_k + w * slot_position_w
        old_k = load_rows(slot_k + b * slot_k_b + kv * slot_k_k, w, slot_k_w, kept, P, BLOCK_P)
        old_v = load_rows(slot_v + b * slot_v_b + kv * slot_v_k, w, slot_v_w, kept, P, BLOCK_P)
        values_k = tl.where(kept[:, None], old_k, values_k)
        values_v = tl.where(kept[:, None], old_v, values_v)
        scores = tl.where(kept, tl.load(slot_score, mask=kept, other=0.0), scores)
        positions = tl.where(kept, tl.load(slot_position, mask=kept, other=0), positions)
    p_P = tl.arange(0, BLOCK_P)
    ok = write[:, None] & (p_P < P)[None, :]
    tl.store(new_k + w.to(tl.int64)[:, None] * new_k_w + p_P[None, :], values_k, mask=ok)
    tl.store(new_v + w.to(tl.int64)[:, None] * new_v_w + p_P[None, :], values_v, mask=ok)
    tl.store(new_score, scores, mask=write)
    tl.store(new_position, positions, mask=write)


@triton.jit
def _worst(slot_score, slot_position, score_w, position_w, W: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest rank, the first slot that has it, and a bound on the slots in use."""
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), 9223372036854775807, tl.int64)
    place = tl.full((BLOCK,), W, tl.int32)
    used = tl.zeros((BLOCK,), tl.int32)
    for n in range(0, W, BLOCK):
        w = n + lane
        score = tl.load(slot_score + w * score_w, mask=w < W, other=0.0)
        rank = rank_of(score, tl.load(slot_position + w * position_w, mask=w < W, other=-1))
        better = (rank < least) & (w < W)
        least = tl.where(better, rank, least)
        place = tl.where(better, w, place)
        used = tl.where((rank > 0) & (w < W), w + 1, used)
    lowest = tl.min(least, 0)
    return lowest, tl.min(tl.where(least == lowest, place, W), 0), tl.max(used, 0)


@triton.jit
def put(
    k, v, score, slot_k, slot_v, slot_score, slot_position, place, wins, seen, slot_k_w, slot_v_w, slot_score_w, slot_position_w,
    P: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Write the token into a slot if it wins one."""
    p_P = tl.arange(0, BLOCK_P)
    ok_P = (p_P < P) & wins
    tl.store(slot_k + place.to(tl.int64) * slot_k_w + p_P, tl.load(k + p_P, mask=ok_P, other=0.0), mask=ok_P)
    tl.store(slot_v + place.to(tl.int64) * slot_v_w + p_P, tl.load(v + p_P, mask=ok_P, other=0.0), mask=ok_P)
    tl.store(slot_score + place * slot_score_w, tl.load(score), mask=wins)
    tl.store(slot_position + place * slot_position_w, seen, mask=wins)


@triton.jit
def attend_slots(
    q, k, v, score, slot_k, slot_v, slot_score, slot_position, position, valid, out, acc, tops, choice,
    q_b, q_h, k_b, k_k, v_b, v_k, score_b, score_k, slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w,
    slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k, slot_position_w,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, W: tl.constexpr, HAS_VALID: tl.constexpr,
    SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One token against one share of the slots: its own key replaces the worst one if it beats it. Grid: (SHARES, K, B).

    With one share the output and the slot are written here. Otherwise acc and tops get a partial softmax and choice the slot to write, or
    -1: no share may write what another still reads.
    """
    wait_for_predecessor(DEPENDENT)
    LOG2E: tl.constexpr = 1.4426950408889634
    G: tl.constexpr = H // K
    share = tl.program_id(0)
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += b * k_b + kv * k_k
    v += b * v_b + kv * v_k
    score += b * score_b + kv * score_k
    slot_k += b * slot_k_b + kv * slot_k_k
    slot_v += b * slot_v_b + kv * slot_v_k
    slot_score += b * slot_score_b + kv * slot_score_k
    slot_position += b * slot_position_b + kv * slot_position_k
    lowest, place, used = _worst(slot_score, slot_position, slot_score_w, slot_position_w, W, BLOCK_W)
    seen = tl.load(position + b)
    new_score = tl.load(score)
    wins = (rank_of(new_score, seen) > lowest) & (new_score == new_score)
    if HAS_VALID:
        wins = wins & (tl.load(valid + b) > 0)
    hidden = tl.where(wins, place, W)

    row_R = tl.arange(0, BLOCK_R)
    h_R = kv * G + row_R
    ok_R = row_R < G
    q_RP = load_rows(q + b * q_b, h_R, q_h, ok_R, P, BLOCK_P)
    acc_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    best_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total_R = tl.zeros((BLOCK_R,), tl.float32)
    EACH: tl.constexpr = (W + SHARES - 1) // SHARES
    end = tl.minimum(used, (share + 1) * EACH)
    lane_N = tl.arange(0, BLOCK_N)
    for n in tl.range(share * EACH, end, BLOCK_N, num_stages=STAGES):
        w_N = n + lane_N
        ok_N = w_N < end
        bias_N = tl.load(slot_score + w_N * slot_score_w, mask=ok_N & (w_N != hidden), other=float("-inf")) * LOG2E
        k_NP = load_rows(slot_k, w_N, slot_k_w, ok_N, P, BLOCK_P)
        v_NP = load_rows(slot_v, w_N, slot_v_w, ok_N, P, BLOCK_P)
        logit_RN = tl.dot(q_RP, tl.trans(k_NP), input_precision="ieee") * (SCALE * LOG2E) + bias_N[None, :]
        acc_RP, best_R, total_R = fold(acc_RP, best_R, total_R, logit_RN, v_NP)

    # The token itself, in the share whose slot it takes.
    mine = wins & (place // EACH == share)
    p_P = tl.arange(0, BLOCK_P)
    new_k_P = tl.load(k + p_P, mask=p_P < P, other=0.0)
    new_v_P = tl.load(v + p_P, mask=p_P < P, other=0.0)
    logit_R = tl.sum(q_RP.to(tl.float32) * new_k_P.to(tl.float32)[None, :], 1) * (SCALE * LOG2E) + new_score * LOG2E
    logit_R = tl.where(mine, logit_R, float("-inf"))
    new_best_R = tl.maximum(best_R, logit_R)
    base_R = tl.where(new_best_R == float("-inf"), 0.0, new_best_R)
    weight_R, fade_R = tl.exp2(logit_R - base_R), tl.exp2(best_R - base_R)
    acc_RP = acc_RP * fade_R[:, None] + weight_R[:, None] * new_v_P.to(tl.float32)[None, :]
    total_R = total_R * fade_R + weight_R

    if SHARES == 1:
        at = out + (b * H + h_R)[:, None] * P + p_P[None, :]
        tl.store(at, normalized(acc_RP, total_R).to(out.dtype.element_ty), mask=ok_R[:, None] & (p_P < P)[None, :])
        tl.debug_barrier()  # every thread has read the slots
        put(
            k, v, score, slot_k, slot_v, slot_score, slot_position, place, wins, seen, slot_k_w, slot_v_w, slot_score_w, slot_position_w, P,
            BLOCK_P
        )  # fmt: skip
    else:
        store_partial(acc, tops, acc_RP, new_best_R, total_R, (b * K + kv) * SHARES + share, G, P, BLOCK_P, BLOCK_R)
        tl.store(choice + b * K + kv, tl.where(wins, place, -1), mask=share == 0)


@triton.jit
def combine_and_replace(
    k, v, score, slot_k, slot_v, slot_score, slot_position, position, acc, tops, choice, out,
    k_b, k_k, v_b, v_k, score_b, score_k, slot_k_b, slot_k_k, slot_k_w, slot_v_b, slot_v_k, slot_v_w,
    slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k, slot_position_w,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, SHARES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The output from the shares of `attend_slots`, and the slot that the token takes. Grid: (H, B)."""
    wait_for_predecessor(DEPENDENT)
    G: tl.constexpr = H // K
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv = (h // G).to(tl.int64)
    value_P = combined(acc, tops, h % G, b * K + kv, SHARES, P, BLOCK_P, BLOCK_R)
    p_P = tl.arange(0, BLOCK_P)
    tl.store(out + (b * H + h) * P + p_P, value_P.to(out.dtype.element_ty), mask=p_P < P)
    place = tl.load(choice + b * K + kv)
    wins = (place >= 0) & (h % G == 0)
    put(
        k + b * k_b + kv * k_k, v + b * v_b + kv * v_k, score + b * score_b + kv * score_k, slot_k + b * slot_k_b + kv * slot_k_k,
        slot_v + b * slot_v_b + kv * slot_v_k, slot_score + b * slot_score_b + kv * slot_score_k,
        slot_position + b * slot_position_b + kv * slot_position_k, place, wins, tl.load(position + b), slot_k_w, slot_v_w, slot_score_w,
        slot_position_w, P, BLOCK_P
    )  # fmt: skip
