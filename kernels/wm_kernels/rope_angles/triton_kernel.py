"""Rotary angles. M = B·T tokens, F rotated pairs."""

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.283185307179586)


@triton.jit(do_not_specialize=["M", "T"])
def rope_angles_kernel(
    position_BT, length_B, cos_BTF, sin_BTF, M, T,
    F: tl.constexpr, LOG2_THETA: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr, ORIGINAL: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens; in float64, rounded once. All tensors are contiguous."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.arange(0, BLOCK_F)
    j = f.to(tl.float64)
    frequency = tl.exp2(j * (-LOG2_THETA / F))
    if SCALING == "linear":
        frequency = frequency / FACTOR
    if SCALING == "llama3":
        kept = tl.minimum(tl.maximum((ORIGINAL * frequency / TWO_PI - LOW) / (HIGH - LOW), 0.0), 1.0)
        frequency = frequency * (kept + (1 - kept) / FACTOR)
    angle = tl.load(position_BT + m, mask=m < M, other=0).to(tl.float64)[:, None] * frequency[None, :]
    if SCALING == "dynamic":
        beyond = tl.maximum(tl.load(length_B + m // T, mask=m < M, other=0) - ORIGINAL, 0).to(tl.float64)
        ratio = 1.0 + beyond * (FACTOR / ORIGINAL)
        angle = angle * tl.exp2(tl.log2(ratio)[:, None] * (j * (-1.0 / max(F - 1, 1)))[None, :])
    at = m.to(tl.int64)[:, None] * F + f[None, :]
    inside = (m < M)[:, None] & (f < F)[None, :]
    tl.store(cos_BTF + at, tl.cos(angle).to(tl.float32), mask=inside)
    tl.store(sin_BTF + at, tl.sin(angle).to(tl.float32), mask=inside)
