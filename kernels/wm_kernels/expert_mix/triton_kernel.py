"""Mixture of one-neuron experts.

M tokens   D model   E experts   Q picks of one token   S slices of D

Rows of the tables are read through the L2 cache and never gathered in memory. Slices are the slowest axis of the grid: all tokens read one
slice of the table, which fits in L2, before any reads the next. Where a token picks a good part of all experts, matrix products over all of
them are faster than reading the rows one by one; the last kernel stands between the two products.
"""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """SiLU, or GELU with erf."""
    if ACTIVATION == "silu":
        return x / (1 + tl.exp2(-LOG2E * x))
    else:
        return 0.5 * x * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def _hidden(inner, weight, ACTIVATION: tl.constexpr, WEIGHT_INSIDE: tl.constexpr):
    if WEIGHT_INSIDE:
        return activate(weight * inner, ACTIVATION)
    else:
        return activate(inner, ACTIVATION) * weight


@triton.jit(do_not_specialize=["M", "T"])
def expert_inner_kernel(
    x_BTD, expert_MQ, weight_MQ, down_ED, inner_SMQ, M, T, x_stride_B, x_stride_T, down_stride,
    D: tl.constexpr, Q: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_INSIDE: tl.constexpr, FINISH: tl.constexpr,
    TOKENS: tl.constexpr, PICKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """inner[s, m, q] = x_m · down_e over slice s of D, e the q-th pick of m; hidden[m, q] at once where there is one slice.

    A program does PICKS picks of each of TOKENS tokens, BLOCK_Q rows at a time.
    """
    wait_for_predecessor(DEPENDENT)
    s = tl.program_id(1)
    first = tl.program_id(0) * TOKENS
    col = s * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = col < D
    for m in range(first, tl.minimum(first + TOKENS, M)):
        m_64 = first.to(tl.int64) + (m - first)
        x = tl.load(x_BTD + (m_64 // T) * x_stride_B + (m_64 % T) * x_stride_T + col, mask=in_D, other=0).to(tl.float32)
        for start in tl.static_range(0, PICKS, BLOCK_Q):
            q = tl.program_id(2) * PICKS + start + tl.arange(0, BLOCK_Q)
            in_Q = q < Q
            at = m_64 * Q + q
            e = tl.load(expert_MQ + at, mask=in_Q, other=0)
            row = down_ED + e[:, None] * down_stride + col[None, :]
            down = tl.load(row, mask=in_Q[:, None] & in_D[None, :], other=0).to(tl.float32)
            inner = tl.sum(down * x[None, :], 1)
            if FINISH:
                weight = tl.load(weight_MQ + at, mask=in_Q, other=0).to(tl.float32)
                inner = _hidden(inner, weight, ACTIVATION, WEIGHT_INSIDE)
            tl.store(inner_SMQ + s.to(tl.int64) * M * Q + at, inner, mask=in_Q)


@triton.jit(do_not_specialize=["COUNT"])
def expert_hidden_kernel(
    inner_SMQ, weight_MQ, hidden_MQ, COUNT,
    S: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_INSIDE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden = act(w inner) or w act(inner), inner summed over the slices; COUNT = M Q."""
    wait_for_predecessor(DEPENDENT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COUNT
    inner = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):
        inner += tl.load(inner_SMQ + tl.full((1,), s, tl.int64) * COUNT + at, mask=inside, other=0)
    weight = tl.load(weight_MQ + at, mask=inside, other=0).to(tl.float32)
    tl.store(hidden_MQ + at, _hidden(inner, weight, ACTIVATION, WEIGHT_INSIDE), mask=inside)


@triton.jit(do_not_specialize=["M"])
def expert_outer_kernel(
    expert_MQ, hidden_MQ, up_ED, y_MD, M, up_stride,
    D: tl.constexpr, Q: tl.constexpr, TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[m] = sum of hidden[m, q] up_e over the picks, in their order; a program does one slice of D of TOKENS tokens. y is contiguous."""
    wait_for_predecessor(DEPENDENT)
    first = tl.program_id(0) * TOKENS
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = col < D
    for m in range(first, tl.minimum(first + TOKENS, M)):
        m_64 = first.to(tl.int64) + (m - first)
        y = tl.zeros((BLOCK_D,), tl.float32)
        for start in tl.static_range(0, Q, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            in_Q = q < Q
            at = m_64 * Q + q
            e = tl.load(expert_MQ + at, mask=in_Q, other=0)
            hidden = tl.load(hidden_MQ + at, mask=in_Q, other=0)
            row = up_ED + e[:, None] * up_stride + col[None, :]
            up = tl.load(row, mask=in_Q[:, None] & in_D[None, :], other=0).to(tl.float32)
            y += tl.sum(up * hidden[:, None], 0)
        tl.store(y_MD + m_64 * D + col, y.to(y_MD.dtype.element_ty), mask=in_D)


@triton.jit(do_not_specialize=["M"])
def expert_spread_kernel(
    inner_ME, expert_MQ, weight_MQ, hidden_ME, rest_ME, M,
    E: tl.constexpr, Q: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHT_INSIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """hidden + rest = the hidden value of every expert, summed over a token's picks of it, 0 without any; a program does a token.

    hidden is rounded to the tables' dtype, and rest holds what that leaves out.
    """
    m = tl.program_id(0).to(tl.int64)
    none = tl.zeros((BLOCK_E,), hidden_ME.dtype.element_ty)
    for start in tl.static_range(0, E, BLOCK_E):
        col = start + tl.arange(0, BLOCK_E)
        tl.store(hidden_ME + m * E + col, none, mask=col < E)
        tl.store(rest_ME + m * E + col, none, mask=col < E)
    tl.debug_barrier()  # the zeros are there before a pick is written
    for first in range(0, Q, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        e = tl.load(expert_MQ + m * Q + q, mask=q < Q, other=0)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        for other in range(0, Q, BLOCK_Q):
            o = other + tl.arange(0, BLOCK_Q)
            e_o = tl.load(expert_MQ + m * Q + o, mask=o < Q, other=0)
            weight = tl.load(weight_MQ + m * Q + o, mask=o < Q, other=0).to(tl.float32)
            inner = tl.load(inner_ME + m * E + e_o, mask=o < Q, other=0)
            hidden = tl.where(o < Q, _hidden(inner, weight, ACTIVATION, WEIGHT_INSIDE), 0.0)
            # Picks of one expert all make the same sum, in the same order, so that it does not matter which of them is stored last.
            total += tl.sum(tl.where(e[:, None] == e_o[None, :], hidden[None, :], 0.0), 1)
        rounded = total.to(hidden_ME.dtype.element_ty)
        tl.store(hidden_ME + m * E + e, rounded, mask=q < Q)
        tl.store(rest_ME + m * E + e, (total - rounded.to(tl.float32)).to(rest_ME.dtype.element_ty), mask=q < Q)
