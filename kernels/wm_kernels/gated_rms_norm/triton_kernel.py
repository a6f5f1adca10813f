"""Gated RMS normalisation. M rows, C channels."""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["M"])
def gated_rms_norm_kernel(
    y_MC, z_MC, weight_C, out_MC, M, y_stride, z_stride,
    C: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Gate and normalise ROWS rows at a time; a program goes on until all rows are done. The output is contiguous."""
    wait_for_predecessor(DEPENDENT)
    col = tl.arange(0, BLOCK_C)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        row_64 = row.to(tl.int64)[:, None]
        square = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for start in tl.static_range(0, C, BLOCK_C):
            at = start + col[None, :]
            inside = (row < M)[:, None] & (at < C)
            gated = _gated(y_MC, z_MC, row_64, at, inside, y_stride, z_stride)
            square += gated * gated
        inverse = tl.rsqrt(tl.sum(square, 1) / C + EPS)[:, None]
        for start in tl.static_range(0, C, BLOCK_C):
            at = start + col[None, :]
            inside = (row < M)[:, None] & (at < C)
            if C > BLOCK_C:
                gated = _gated(y_MC, z_MC, row_64, at, inside, y_stride, z_stride)
            unit = (gated * inverse).to(out_MC.dtype.element_ty).to(tl.float32)
            weight = tl.load(weight_C + at, mask=at < C, other=0).to(tl.float32)
            tl.store(out_MC + row_64 * C + at, (weight * unit).to(out_MC.dtype.element_ty), mask=inside)


@triton.jit
def _gated(y_MC, z_MC, row_64, at, inside, y_stride, z_stride):
    y = tl.load(y_MC + row_64 * y_stride + at, mask=inside, other=0).to(tl.float32)
    z = tl.load(z_MC + row_64 * z_stride + at, mask=inside, other=0).to(tl.float32)
    return y * (z / (1 + tl.exp2(-LOG2E * z)))
