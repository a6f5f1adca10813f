"""Rotary position embedding. M tokens, H heads, P head dimension, F rotated pairs."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "T"])
def rope_kernel(
    x_BTHP, cos_BTF, sin_BTF, y_MHP, M, T, x_stride_B, x_stride_T, x_stride_H, cos_stride_B, cos_stride_T, sin_stride_B, sin_stride_T,
    H: tl.constexpr, P: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of BLOCK_M tokens; y is contiguous."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    b, t = (m // T).to(tl.int64)[:, None], (m % T).to(tl.int64)[:, None]
    rows = (m < M)[:, None] & (h < H)[None, :]
    x_row = x_BTHP + (b * x_stride_B + t * x_stride_T + h[None, :] * x_stride_H)[:, :, None]
    y_row = y_MHP + ((m.to(tl.int64)[:, None] * H + h[None, :]) * P)[:, :, None]

    f = tl.arange(0, BLOCK_F)
    in_angles = (m < M)[:, None] & (f < F)[None, :]
    cos = tl.load(cos_BTF + b * cos_stride_B + t * cos_stride_T + f[None, :], mask=in_angles, other=0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_BTF + b * sin_stride_B + t * sin_stride_T + f[None, :], mask=in_angles, other=0).to(tl.float32)[:, None, :]
    inside = rows[:, :, None] & (f < F)[None, None, :]
    at = f[None, None, :]
    low = tl.load(x_row + at, mask=inside, other=0).to(tl.float32)
    high = tl.load(x_row + F + at, mask=inside, other=0).to(tl.float32)
    dtype: tl.constexpr = y_MHP.dtype.element_ty
    tl.store(y_row + at, (low * cos - high * sin).to(dtype), mask=inside)
    tl.store(y_row + F + at, (high * cos + low * sin).to(dtype), mask=inside)
    if 2 * F < P:
        rest = 2 * F + tl.arange(0, BLOCK_REST)[None, None, :]
        inside = rows[:, :, None] & (rest < P)
        tl.store(y_row + rest, tl.load(x_row + rest, mask=inside, other=0), mask=inside)
