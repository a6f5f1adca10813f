"""Product-key retrieval.

M tokens   R retrieval heads   d half a query's width   J sub-keys per half   k picks   K k up to a power of two   S slots
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LAST = tl.constexpr(2**31 - 1)


@triton.jit
def select(value_MN, index_MN, rank_S, COUNT: tl.constexpr):
    """The COUNT largest of every row with their indices, ties to the lower index: slot s holds the one of rank rank_S[s], from 0.

    Indices of a row differ, but for those of entries that are -inf.
    """
    shape: tl.constexpr = (value_MN.shape[0], rank_S.shape[0])
    top_value = tl.full(shape, float("-inf"), tl.float32)
    top_index = tl.full(shape, LAST, tl.int32)
    for n in range(COUNT):
        best = tl.max(value_MN, 1)[:, None]
        pick = tl.min(tl.where(value_MN == best, index_MN, LAST), 1)[:, None]
        value_MN = tl.where(index_MN == pick, float("-inf"), value_MN)
        here = rank_S[None, :] == n
        top_value = tl.where(here, best, top_value)
        top_index = tl.where(here, pick, top_index)
    return top_value, top_index


@triton.jit
def product_key_topk_kernel(
    query_BTR2d, keys_RJ2d, weight_MRk, expert_MRk, M, T,
    query_stride_B, query_stride_T, query_stride_R, query_stride_2, keys_stride_R, keys_stride_J, keys_stride_2,
    R: tl.constexpr, d: tl.constexpr, J: tl.constexpr, k: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of one head: scores of both halves, the k best of each, the k best of their sums, softmax. Outputs are contiguous."""
    # Of the pairs of ranks (a, b) only those with (a + 1)(b + 1) <= k can win: all that rank before in both halves score no less.
    # The slots are these pairs, row a after row a - 1, and of every row one pair more, the best of those left out.
    slot = tl.arange(0, SLOTS)
    a = tl.zeros((SLOTS,), tl.int32)
    start = tl.zeros((SLOTS,), tl.int32)
    end = 0
    for row in tl.static_range(k):
        a = tl.where(slot >= end, row, a)
        start = tl.where(slot >= end, end, start)
        end += min(k // (row + 1) + 1, k)
    b = tl.where(slot < end, slot - start, k)

    r = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_M = m < M
    m_64 = m.to(tl.int64)
    query_at = query_BTR2d + (m_64 // T) * query_stride_B + (m_64 % T) * query_stride_T + r * query_stride_R
    keys_at = keys_RJ2d + r.to(tl.int64) * keys_stride_R
    x, i = _half(query_at, keys_at, in_M, keys_stride_J, a, d, J, k, BLOCK_d, BLOCK_J, K, INTERPRETED)
    y, j = _half(query_at + query_stride_2, keys_at + keys_stride_2, in_M, keys_stride_J, b, d, J, k, BLOCK_d, BLOCK_J, K, INTERPRETED)

    wins = ((a + 1) * (b + 1) <= k)[None, :]
    sums = x + y
    rank = tl.arange(0, K)
    score, expert = select(tl.where(wins, sums, float("-inf")), tl.where(wins, i * J + j, LAST), rank, k)

    # Sums can round to one number where a summand differs. A pair that was left out then may tie with a winner and be of lower index.
    col = rank[None, :]
    least = tl.min(tl.where(col < k, score, float("inf")), 1)
    left_out = tl.max(tl.where(wins, float("-inf"), sums), 1)
    if tl.max(((left_out >= least) & in_M).to(tl.int32), 0) > 0:
        score, expert = _select_all(x, i, y, j, a[None, :], b[None, :], J, k, K)

    top = tl.max(score, 1)[:, None]
    raised = tl.where(col < k, tl.exp2((score - top) * LOG2E), 0.0)
    weight = raised / tl.sum(raised, 1)[:, None]
    at = (m_64[:, None] * R + r) * k + col
    inside = in_M[:, None] & (col < k)
    tl.store(weight_MRk + at, weight.to(weight_MRk.dtype.element_ty), mask=inside)
    # Scores that are no numbers choose nothing; their indices stay in range.
    tl.store(expert_MRk + at, tl.minimum(expert, J * J - 1).to(tl.int64), mask=inside)


@triton.jit
def _half(
    query_at, keys_at, in_M, keys_stride_J, rank_S,
    d: tl.constexpr, J: tl.constexpr, k: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Scores and indices [M, S] of the sub-keys of one half, by rank; -inf in slots of rank k."""
    at_d = tl.arange(0, BLOCK_d)
    query = tl.load(query_at[:, None] + at_d[None, :], mask=in_M[:, None] & (at_d < d)[None, :], other=0)
    value, index = _scores(query, keys_at, keys_stride_J, 0, d, J, BLOCK_d, BLOCK_J, INTERPRETED)
    if J <= BLOCK_J:
        top_value, top_index = select(value, index, rank_S, k)
    else:
        rank = tl.arange(0, K)
        best_value, best_index = select(value, index, rank, k)
        for first in tl.static_range(BLOCK_J, J, BLOCK_J):
            value, index = _scores(query, keys_at, keys_stride_J, first, d, J, BLOCK_d, BLOCK_J, INTERPRETED)
            best_value, best_index = _select_of_two(best_value, best_index, value, index, rank, k)
        top_value, top_index = select(best_value, best_index, rank_S, k)
    return top_value, tl.minimum(top_index, J - 1)


@triton.jit
def _scores(
    query, keys_at, keys_stride_J,
    first: tl.constexpr, d: tl.constexpr, J: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    at_d = tl.arange(0, BLOCK_d)
    sub_key = first + tl.arange(0, BLOCK_J)
    inside = (sub_key < J)[None, :] & (at_d < d)[:, None]
    keys_dJ = tl.load(keys_at + sub_key.to(tl.int64)[None, :] * keys_stride_J + at_d[:, None], mask=inside, other=0)
    if INTERPRETED:
        query, keys_dJ = query.to(tl.float32), keys_dJ.to(tl.float32)
    score = tl.dot(query, keys_dJ, input_precision="ieee")
    score = tl.where((sub_key < J)[None, :], score, float("-inf"))
    return score, tl.broadcast_to(sub_key[None, :], score.shape)


@triton.jit
def _select_of_two(value_MK, index_MK, value_MN, index_MN, rank_K, COUNT: tl.constexpr):
    """`select` from two tables."""
    top_value = tl.full(value_MK.shape, float("-inf"), tl.float32)
    top_index = tl.full(value_MK.shape, LAST, tl.int32)
    for n in range(COUNT):
        best = tl.maximum(tl.max(value_MK, 1), tl.max(value_MN, 1))[:, None]
        pick_K = tl.min(tl.where(value_MK == best, index_MK, LAST), 1)
        pick = tl.minimum(pick_K, tl.min(tl.where(value_MN == best, index_MN, LAST), 1))[:, None]
        value_MK = tl.where(index_MK == pick, float("-inf"), value_MK)
        value_MN = tl.where(index_MN == pick, float("-inf"), value_MN)
        here = rank_K[None, :] == n
        top_value = tl.where(here, best, top_value)
        top_index = tl.where(here, pick, top_index)
    return top_value, top_index


@triton.jit
def _select_all(x_MS, i_MS, y_MS, j_MS, a_S, b_S, J: tl.constexpr, k: tl.constexpr, K: tl.constexpr):
    """The k best of all k * k sums, ties to the lower expert: slow, and called where rounding made a tie that pruning cannot see."""
    M: tl.constexpr = x_MS.shape[0]
    rank = tl.arange(0, K)[None, :]
    score = tl.full((M, K), float("-inf"), tl.float32)
    expert = tl.full((M, K), LAST, tl.int32)
    last_score = tl.full((M, 1), float("inf"), tl.float32)
    last_expert = tl.full((M, 1), -1, tl.int32)
    for n in range(k):
        best = tl.full((M, 1), float("-inf"), tl.float32)
        pick = tl.full((M, 1), LAST, tl.int32)
        for row in range(k):
            # Slot (row, 0) holds x of rank `row`; the slots of row 0 hold all of y.
            in_row = (a_S == row) & (b_S == 0)
            x = tl.max(tl.where(in_row, x_MS, float("-inf")), 1)[:, None]
            i = tl.min(tl.where(in_row, i_MS, LAST), 1)[:, None]
            sums = x + y_MS
            experts = i * J + j_MS
            later = (sums < last_score) | ((sums == last_score) & (experts > last_expert))
            sums = tl.where(later & (a_S == 0) & (b_S < k), sums, float("-inf"))
            row_best = tl.max(sums, 1)[:, None]
            row_pick = tl.min(tl.where(sums == row_best, experts, LAST), 1)[:, None]
            better = (row_best > best) | ((row_best == best) & (row_pick < pick))
            best = tl.where(better, row_best, best)
            pick = tl.where(better, row_pick, pick)
        score = tl.where(rank == n, best, score)
        expert = tl.where(rank == n, pick, expert)
        last_score = best
        last_expert = pick
    return score, expert
