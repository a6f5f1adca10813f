"""What lies between and after the grouped products of moe_mix, and mixtures of few tokens, pick by pick.

M tokens   k picks   N = M k picks, for the grouped products sorted by expert   D model   I inner width
F rows of an expert's input matrix: I, or 2 I where gated
"""

import triton
import triton.language as tl

from wm_kernels.expert_mix.triton_kernel import activate


@triton.jit(do_not_specialize=["N"])
def moe_hidden_kernel(
    inner_NF, in_bias_EF, expert_N, hidden_NI, N,
    I: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """hidden = act(inner + bias), or act of the first half times the second. All tensors are contiguous."""
    F: tl.constexpr = 2 * I if GATED else I
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    inside = (row < N)[:, None] & (col < I)
    row_64 = row.to(tl.int64)[:, None]
    expert = tl.load(expert_N + row, mask=row < N, other=0)[:, None]
    hidden = tl.load(inner_NF + row_64 * F + col, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        hidden += tl.load(in_bias_EF + expert * F + col, mask=inside, other=0).to(tl.float32)
    hidden = activate(hidden, ACTIVATION)
    if GATED:
        other = tl.load(inner_NF + row_64 * F + I + col, mask=inside, other=0).to(tl.float32)
        if HAS_BIAS:
            other += tl.load(in_bias_EF + expert * F + I + col, mask=inside, other=0).to(tl.float32)
        hidden *= other
    tl.store(hidden_NI + row_64 * I + col, hidden.to(hidden_NI.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def moe_combine_kernel(
    out_ND, out_bias_ED, expert_Mk, weight_Mk, place_Mk, y_MD, M,
    D: tl.constexpr, k: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[m] = sum over the picks, in their order, of weight (out[place] + bias of the expert). All tensors are contiguous."""
    m = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = col < D
    y = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.static_range(k):
        place = tl.load(place_Mk + m * k + n)
        out = tl.load(out_ND + place * D + col, mask=in_D, other=0).to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(expert_Mk + m * k + n)
            out += tl.load(out_bias_ED + expert * D + col, mask=in_D, other=0).to(tl.float32)
        y += tl.load(weight_Mk + m * k + n).to(tl.float32) * out
    tl.store(y_MD + m * D + col, y.to(y_MD.dtype.element_ty), mask=in_D)


@triton.jit
def moe_pick_hidden_kernel(
    x_MD, expert_N, in_EFD, in_bias_EF, hidden_NI, x_stride, in_stride_E, in_stride_F, bias_stride,
    D: tl.constexpr, I: tl.constexpr, k: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden = act(W_in x + b_in) of a pick, or act of the first half times the second: BLOCK_I of its entries, float32 and contiguous."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    e = tl.load(expert_N + n)
    x_at, in_at = x_MD + n // k * x_stride, in_EFD + e * in_stride_E
    hidden = _rows_times(in_at, x_at, row, in_stride_F, I, D, BLOCK_I, BLOCK_D)
    if HAS_BIAS:
        hidden += tl.load(in_bias_EF + e * bias_stride + row, mask=row < I, other=0).to(tl.float32)
    hidden = activate(hidden, ACTIVATION)
    if GATED:
        other = _rows_times(in_at + tl.full((), I, tl.int64) * in_stride_F, x_at, row, in_stride_F, I, D, BLOCK_I, BLOCK_D)
        if HAS_BIAS:
            other += tl.load(in_bias_EF + e * bias_stride + I + row, mask=row < I, other=0).to(tl.float32)
        hidden *= other
    tl.store(hidden_NI + n * I + row, hidden, mask=row < I)


@triton.jit
def moe_pick_outer_kernel(
    hidden_NI, expert_N, weight_N, out_EDI, out_bias_ED, y_MD, out_stride_E, out_stride_D, bias_stride,
    D: tl.constexpr, I: tl.constexpr, k: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = sum over a token's picks, in their order, of weight (W_out hidden + b_out): BLOCK_D of its entries. y is contiguous."""
    m = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_D,), tl.float32)
    for pick in range(k):
        e = tl.load(expert_N + m * k + pick)
        out = _rows_times(out_EDI + e * out_stride_E, hidden_NI + (m * k + pick) * I, row, out_stride_D, D, I, BLOCK_D, BLOCK_I)
        if HAS_BIAS:
            out += tl.load(out_bias_ED + e * bias_stride + row, mask=row < D, other=0).to(tl.float32)
        y += tl.load(weight_N + m * k + pick).to(tl.float32) * out
    tl.store(y_MD + m * D + row, y.to(y_MD.dtype.element_ty), mask=row < D)


@triton.jit
def _rows_times(matrix_RC, vector_C, row, stride, R: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The products of BLOCK_R rows of a matrix of R rows and C columns with a vector, float32."""
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, C, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        vector = tl.load(vector_C + col, mask=col < C, other=0).to(tl.float32)
        inside = (row < R)[:, None] & (col < C)[None, :]
        matrix = tl.load(matrix_RC + row.to(tl.int64)[:, None] * stride + col[None, :], mask=inside, other=0)
        total += tl.sum(matrix.to(tl.float32) * vector[None, :], 1)
    return total
