"""Triton kernels that cannot travel, each for a reason of its own, and one that can."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(x, y, M, stride, D: tl.constexpr, ROWS: tl.constexpr):
    m, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    at = m[:, None] * stride + d[None, :]
    tl.store(y + at, tl.load(x + at, mask=(m < M)[:, None]), mask=(m < M)[:, None])


@triton.jit
def scale_rows(x, y, scale, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(y + d, tl.load(x + d) * scale)


@triton.jit
def describe_rows(x, y, M, D: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, shape=[M, D], strides=[D, 1], block_shape=[ROWS, D])
    m, d = tl.arange(0, ROWS), tl.arange(0, D)
    tl.store(y + m[:, None] * D + d[None, :], rows.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def multiply(a, b, c, N, BLOCK: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, N, 64):
        a_MK = tl.load(a + m[:, None] * 4096 + (first + k)[None, :])
        b_KN = tl.load(b + (first + k)[:, None] * 4096 + n[None, :])
        total = tl.dot(a_MK, b_KN, total)
    tl.store(c + m[:, None] * 4096 + n[None, :], total)
