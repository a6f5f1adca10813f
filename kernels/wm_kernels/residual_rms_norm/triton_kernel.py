"""Residual addition and RMS normalisation. M rows, D model."""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor


@triton.jit(do_not_specialize=["M"])
def residual_rms_norm_kernel(
    x_MD, residual_MD, scale_D, weight_D, normed_MD, sum_MD, M, x_stride, residual_stride,
    D: tl.constexpr, EPS: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows at a time; a program goes on until all rows are done. Outputs are contiguous."""
    wait_for_predecessor(DEPENDENT)
    col = tl.arange(0, BLOCK_D)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        row_64 = row.to(tl.int64)[:, None]
        square = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in tl.static_range(0, D, BLOCK_D):
            at = start + col[None, :]
            inside = (row < M)[:, None] & (at < D)
            total = _sum(x_MD, residual_MD, scale_D, row_64, at, inside, x_stride, residual_stride, HAS_SCALE)
            tl.store(sum_MD + row_64 * D + at, total, mask=inside)
            wide = total.to(tl.float32)
            square += wide * wide
        inverse = tl.rsqrt(tl.sum(square, 1) / D + EPS)[:, None]
        for start in tl.static_range(0, D, BLOCK_D):
            at = start + col[None, :]
            inside = (row < M)[:, None] & (at < D)
            if D > BLOCK_D:
                # Made again rather than read back: another thread may have written it.
                total = _sum(x_MD, residual_MD, scale_D, row_64, at, inside, x_stride, residual_stride, HAS_SCALE)
            unit = (total.to(tl.float32) * inverse).to(total.dtype).to(tl.float32)
            weight = tl.load(weight_D + at, mask=at < D, other=0).to(tl.float32)
            tl.store(normed_MD + row_64 * D + at, (weight * unit).to(total.dtype), mask=inside)


@triton.jit
def _sum(x_MD, residual_MD, scale_D, row_64, at, inside, x_stride, residual_stride, HAS_SCALE: tl.constexpr):
    x = tl.load(x_MD + row_64 * x_stride + at, mask=inside, other=0)
    residual = tl.load(residual_MD + row_64 * residual_stride + at, mask=inside, other=0).to(tl.float32)
    if HAS_SCALE:
        residual *= tl.load(scale_D + at, mask=inside, other=0).to(tl.float32)
    return (x.to(tl.float32) + residual).to(x.dtype)
