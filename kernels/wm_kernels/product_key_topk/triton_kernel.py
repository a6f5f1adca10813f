"""Product-key retrieval.

M tokens   R retrieval heads   d half a query's width   J sub-keys per half   k picks   K k up to a power of two   N entries of a table
"""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)
LAST = tl.constexpr(2**31 - 1)
ROUNDING = tl.constexpr(2.0**-22)  # numbers below 1 that differ by more than this stay apart when one number is added to both


@triton.jit
def select(value_MN, index_MN, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """The COUNT largest of every row with their indices, best first, ties to the lower index; then -inf and `LAST`.

    Indices of a row differ, but for those of entries that are -inf.
    """
    rank = tl.arange(0, WIDTH)[None, :]
    top_value = tl.full((value_MN.shape[0], WIDTH), float("-inf"), tl.float32)
    top_index = tl.full((value_MN.shape[0], WIDTH), LAST, tl.int32)
    for n in range(COUNT):
        best = tl.max(value_MN, 1)[:, None]
        pick = tl.min(tl.where(value_MN == best, index_MN, LAST), 1)[:, None]
        value_MN = tl.where(index_MN == pick, float("-inf"), value_MN)
        top_value = tl.where(rank == n, best, top_value)
        top_index = tl.where(rank == n, pick, top_index)
    return top_value, top_index


@triton.jit(do_not_specialize=["M", "T"])
def product_key_topk_kernel(
    query_BTR2d, keys_RJ2d, weight_MRk, expert_MRk, M, T,
    query_stride_B, query_stride_T, query_stride_R, query_stride_2, keys_stride_R, keys_stride_J, keys_stride_2,
    R: tl.constexpr, d: tl.constexpr, J: tl.constexpr, k: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, K: tl.constexpr, INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of one head: scores of both halves, the k best of each, the k best of their sums, softmax. Outputs are contiguous."""
    wait_for_predecessor(DEPENDENT)
    r = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_M = m < M
    query_at = query_BTR2d + (m // T).to(tl.int64) * query_stride_B + (m % T).to(tl.int64) * query_stride_T + r * query_stride_R
    keys_at = keys_RJ2d + r.to(tl.int64) * keys_stride_R
    x, i = _half(query_at, keys_at, in_M, keys_stride_J, d, J, k, BLOCK_d, BLOCK_J, K, INTERPRETED)
    y, j = _half(query_at + query_stride_2, keys_at + keys_stride_2, in_M, keys_stride_J, d, J, k, BLOCK_d, BLOCK_J, K, INTERPRETED)

    score, expert = _best_sums(x, i, y, j, J, k, K)
    if tl.max((_sums_may_tie(x, y, k, K) & in_M[:, None]).to(tl.int32)) > 0:
        score, expert = _best_of_all_sums(x, i, y, j, J, k, K)

    rank = tl.arange(0, K)[None, :]
    top = tl.max(score, 1)[:, None]
    raised = tl.where(rank < k, tl.exp2((score - top) * LOG2E), 0.0)
    weight = raised / tl.sum(raised, 1)[:, None]
    at = (m.to(tl.int64)[:, None] * R + r) * k + rank
    inside = in_M[:, None] & (rank < k)
    tl.store(weight_MRk + at, weight.to(weight_MRk.dtype.element_ty), mask=inside)
    # Scores that are no numbers choose nothing; their indices stay in range.
    tl.store(expert_MRk + at, tl.minimum(expert, J * J - 1).to(tl.int64), mask=inside)


@triton.jit
def _half(
    query_at, keys_at, in_M, keys_stride_J,
    d: tl.constexpr, J: tl.constexpr, k: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Scores and indices [M, K] of the k best sub-keys of one half, best first; then -inf and the last index."""
    at_d = tl.arange(0, BLOCK_d)
    query = tl.load(query_at[:, None] + at_d[None, :], mask=in_M[:, None] & (at_d < d)[None, :], other=0)
    value, index = _scores(query, keys_at, keys_stride_J, 0, d, J, BLOCK_d, BLOCK_J, INTERPRETED)
    best_value, best_index = select(value, index, k, K)
    for first in range(BLOCK_J, J, BLOCK_J):
        value, index = _scores(query, keys_at, keys_stride_J, first, d, J, BLOCK_d, BLOCK_J, INTERPRETED)
        best_value, best_index = _select_of_two(best_value, best_index, value, index, k)
    return best_value, tl.minimum(best_index, J - 1)


@triton.jit
def _scores(
    query, keys_at, keys_stride_J, first,
    d: tl.constexpr, J: tl.constexpr, BLOCK_d: tl.constexpr, BLOCK_J: tl.constexpr, INTERPRETED: tl.constexpr,
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
def _select_of_two(value_MK, index_MK, value_MN, index_MN, COUNT: tl.constexpr):
    """`select` from two tables."""
    rank = tl.arange(0, value_MK.shape[1])[None, :]
    top_value = tl.full(value_MK.shape, float("-inf"), tl.float32)
    top_index = tl.full(value_MK.shape, LAST, tl.int32)
    for n in range(COUNT):
        best = tl.maximum(tl.max(value_MK, 1), tl.max(value_MN, 1))[:, None]
        pick_K = tl.min(tl.where(value_MK == best, index_MK, LAST), 1)
        pick = tl.minimum(pick_K, tl.min(tl.where(value_MN == best, index_MN, LAST), 1))[:, None]
        value_MK = tl.where(index_MK == pick, float("-inf"), value_MK)
        value_MN = tl.where(index_MN == pick, float("-inf"), value_MN)
        top_value = tl.where(rank == n, best, top_value)
        top_index = tl.where(rank == n, pick, top_index)
    return top_value, top_index


@triton.jit
def _best_sums(x_MK, i_MK, y_MK, j_MK, J: tl.constexpr, k: tl.constexpr, K: tl.constexpr):
    """The k best sums x + y, ties to the lower expert i J + j, as a merge of k lists: that of each x, in the order of y.

    A list's first sum that was not taken is its head. The lists are in order unless two sums of one list may be equal by rounding.
    """
    rank = tl.arange(0, K)[None, :]
    score = tl.full(x_MK.shape, float("-inf"), tl.float32)
    expert = tl.full(x_MK.shape, LAST, tl.int32)
    at = tl.zeros(x_MK.shape, tl.int32)
    head = x_MK + tl.max(tl.where(rank == 0, y_MK, float("-inf")), 1)[:, None]
    head_expert = i_MK * J + tl.min(tl.where(rank == 0, j_MK, LAST), 1)[:, None]
    for n in range(k):
        best = tl.max(head, 1)[:, None]
        pick = tl.min(tl.where(head == best, head_expert, LAST), 1)[:, None]
        score = tl.where(rank == n, best, score)
        expert = tl.where(rank == n, pick, expert)
        taken = (head == best) & (head_expert == pick)
        after = tl.max(tl.where(taken, at, 0), 1)[:, None] + 1
        at = tl.where(taken, after, at)
        head = tl.where(taken, x_MK + tl.max(tl.where(rank == after, y_MK, float("-inf")), 1)[:, None], head)
        head_expert = tl.where(taken, i_MK * J + tl.min(tl.where(rank == after, j_MK, J), 1)[:, None], head_expert)
    return score, expert


@triton.jit
def _sums_may_tie(x_MK, y_MK, k: tl.constexpr, K: tl.constexpr):
    """Whether two different y of a row are so near each other that some x can make one sum of both, [M, 1]."""
    rank = tl.arange(0, K)[None, :]
    gap = tl.full((x_MK.shape[0], 1), float("inf"), tl.float32)
    last = tl.max(y_MK, 1)[:, None]
    for n in range(1, k):
        y = tl.max(tl.where(rank == n, y_MK, float("-inf")), 1)[:, None]
        gap = tl.minimum(gap, tl.where(last > y, last - y, float("inf")))
        last = y
    largest = tl.max(tl.where(rank < k, tl.abs(x_MK), 0.0), 1) + tl.max(tl.where(rank < k, tl.abs(y_MK), 0.0), 1)
    return gap <= largest[:, None] * ROUNDING


@triton.jit
def _best_of_all_sums(x_MK, i_MK, y_MK, j_MK, J: tl.constexpr, k: tl.constexpr, K: tl.constexpr):
    """The k best of all k * k sums, ties to the lower expert: slow, and right however sums round."""
    M: tl.constexpr = x_MK.shape[0]
    rank = tl.arange(0, K)[None, :]
    score = tl.full((M, K), float("-inf"), tl.float32)
    expert = tl.full((M, K), LAST, tl.int32)
    last_score = tl.full((M, 1), float("inf"), tl.float32)
    last_expert = tl.full((M, 1), -1, tl.int32)
    for n in range(k):
        best = tl.full((M, 1), float("-inf"), tl.float32)
        pick = tl.full((M, 1), LAST, tl.int32)
        for row in range(k):
            x = tl.max(tl.where(rank == row, x_MK, float("-inf")), 1)[:, None]
            i = tl.min(tl.where(rank == row, i_MK, LAST), 1)[:, None]
            sums = x + y_MK
            experts = i * J + j_MK
            later = (sums < last_score) | ((sums == last_score) & (experts > last_expert))
            sums = tl.where(later & (rank < k), sums, float("-inf"))
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
