"""Linear layers whose outputs leave in parts, as step sizes, or gated.

M rows   K inputs   N outputs before gates   A, B, C, H widths of the parts
"""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor


@triton.jit(do_not_specialize=["M", "H"])
def few_rows_kernel(
    x_MK, weight_NK, bias_N, step_bias_H, a_MA, b_MB, c_MC, dt_MH, M, A, B, C, H,
    K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STEP_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of ROWS rows: every weight is read once, and before the kernel that makes x has ended."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read = tl.minimum(n, A + B + C + H - 1)
    k = tl.arange(0, BLOCK_K)
    weight_at = weight_NK + read.to(tl.int64)[:, None] * K + k[None, :]
    weight = tl.load(weight_at, mask=(k < K)[None, :], other=0)
    if GATED:
        up_at = weight_NK + (A + read).to(tl.int64)[:, None] * K + k[None, :]
        up = tl.load(up_at, mask=(k < K)[None, :], other=0)
    wait_for_predecessor(DEPENDENT)
    for index in tl.static_range(ROWS):
        row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * ROWS + index
        x = x_MK + tl.minimum(row, M - 1).to(tl.int64) * K
        y = _product(x, weight_at, weight, k, K, BLOCK_K)
        if HAS_BIAS:
            y += tl.load(bias_N + read).to(tl.float32)
        if GATED:
            z = _product(x, up_at, up, k, K, BLOCK_K)
            if HAS_BIAS:
                z += tl.load(bias_N + A + read).to(tl.float32)
            y = y * tl.sigmoid(y) * z
        _store_parts(y[None, :], step_bias_H, a_MA, b_MB, c_MC, dt_MH, row + tl.arange(0, 1), n, M, A, B, C, H, HAS_STEP_BIAS)


@triton.jit
def _product(x_K, weight_at, weight, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of a row with rows of weights, the first columns of which are at hand."""
    y = tl.sum(weight.to(tl.float32) * tl.load(x_K + k, mask=k < K, other=0).to(tl.float32)[None, :], 1)
    for start in tl.static_range(BLOCK_K, K, BLOCK_K):
        at = start + k
        more = tl.load(weight_at + start, mask=(at < K)[None, :], other=0)
        y += tl.sum(more.to(tl.float32) * tl.load(x_K + at, mask=at < K, other=0).to(tl.float32)[None, :], 1)
    return y


@triton.jit(do_not_specialize=["M", "H"])
def tiles_kernel(
    x_MK, weight_NK, bias_N, step_bias_H, a_MA, b_MB, c_MC, dt_MH, M, K, A, B, C, H,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STEP_BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M rows and BLOCK_N outputs. GROUP_M tiles of rows take turns with the same weights, which are then in the cache."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(A + B + C + H, BLOCK_N)
    group, inside = tl.program_id(0) // (GROUP_M * tiles_n), tl.program_id(0) % (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    row = (group * GROUP_M + inside % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = inside // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    read = tl.minimum(n, A + B + C + H - 1)
    k = tl.arange(0, BLOCK_K)
    x_at = x_MK + tl.minimum(row, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_NK + read.to(tl.int64)[None, :] * K + k[:, None]
    up_at = weight_NK + (A + read).to(tl.int64)[None, :] * K + k[:, None]
    wait_for_predecessor(DEPENDENT)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = _tile(x_at, (k < K - start)[None, :], EVEN)
        y = tl.dot(x, _tile(weight_at, (k < K - start)[:, None], EVEN), y, input_precision="ieee")
        if GATED:
            z = tl.dot(x, _tile(up_at, (k < K - start)[:, None], EVEN), z, input_precision="ieee")
            up_at += BLOCK_K
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if HAS_BIAS:
        y += tl.load(bias_N + read).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            z += tl.load(bias_N + A + read).to(tl.float32)[None, :]
        y = y * tl.sigmoid(y) * z
    _store_parts(y, step_bias_H, a_MA, b_MB, c_MC, dt_MH, row, n, M, A, B, C, H, HAS_STEP_BIAS)


@triton.jit
def _tile(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0)


@triton.jit
def _store_parts(y, step_bias_H, a_MA, b_MB, c_MC, dt_MH, row, n, M, A, B, C, H, HAS_STEP_BIAS: tl.constexpr):
    """Each part of y into its own tensor; the last one is the softplus of it and of what is added to it."""
    _store_part(y, a_MA, row, n, M, 0, A)
    _store_part(y, b_MB, row, n, M, A, B)
    _store_part(y, c_MC, row, n, M, A + B, C)
    if tl.max(n, 0) >= A + B + C:
        at = n - (A + B + C)
        step = y.to(a_MA.dtype.element_ty).to(tl.float32)  # as a linear layer of that dtype leaves it
        if HAS_STEP_BIAS:
            step += tl.load(step_bias_H + at, mask=(at >= 0) & (at < H), other=0).to(tl.float32)[None, :]
        _store_part(_softplus(step), dt_MH, row, n, M, A + B + C, H)


@triton.jit
def _store_part(y, part, row, n, M, start, width):
    if (tl.max(n, 0) >= start) & (tl.min(n, 0) < start + width):
        at = n - start
        inside = (row < M)[:, None] & ((at >= 0) & (at < width))[None, :]
        tl.store(part + row.to(tl.int64)[:, None] * width + at[None, :], y.to(part.dtype.element_ty), mask=inside)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to the last bits where exp(x) is small too."""
    exp = tl.exp(tl.minimum(x, 20.0))
    total = 1.0 + exp
    log = tl.where(total == 1.0, exp, tl.log(total) * (exp / tl.where(total == 1.0, 1.0, total - 1.0)))
    return tl.where(x > 20.0, x, log)
