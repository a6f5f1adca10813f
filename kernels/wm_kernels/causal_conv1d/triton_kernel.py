"""Depthwise causal convolution. B batch, T tokens, C channels, L taps, Y = L - 1 inputs kept, S = Y + T inputs read."""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def causal_conv1d_kernel(
    x_BTC, weight_CL, bias_C, before_BYC, valid_B, y_BTC, after_BYC, T,
    x_stride_B, x_stride_T, weight_stride, before_stride_B, before_stride_Y, after_stride_B, after_stride_Y,
    C: tl.constexpr, L: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_VALID: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of BLOCK_C channels: their inputs and the Y before them are read once, all before the first is used.

    The program of a row's first tokens, the only one that reads the state, also writes the new one: state and new state may share memory.
    """
    wait_for_predecessor(DEPENDENT)
    Y: tl.constexpr = L - 1
    BLOCK_Y: tl.constexpr = triton.next_power_of_2(Y)
    # One axis, as the others end at 65535: channels run fastest, then tokens.
    program = tl.program_id(0)
    across: tl.constexpr = tl.cdiv(C, BLOCK_C)
    along = tl.maximum(tl.cdiv(T, BLOCK_T), 1)
    b = (program // across // along).to(tl.int64)
    first = program // across % along * BLOCK_T
    c = program % across * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = c < C
    x_row = x_BTC + b * x_stride_B
    before = before_BYC + b * before_stride_B
    x_at = x_row + first.to(tl.int64) * x_stride_T + c
    inputs = ()
    for i in tl.static_range(BLOCK_T + Y):
        t = first + (i - Y)
        inputs = inputs + (tl.load(x_at + (i - Y) * x_stride_T, mask=in_C & (t >= 0) & (t < T), other=0),)
    taps = ()
    for tap in tl.static_range(L):
        taps = taps + (tl.load(weight_CL + c * weight_stride + tap, mask=in_C, other=0).to(tl.float32),)
    bias = tl.load(bias_C + c, mask=in_C, other=0).to(tl.float32) if HAS_BIAS else tl.zeros((BLOCK_C,), tl.float32)
    y_at = y_BTC + (b * T + first) * C + c
    for i in tl.static_range(BLOCK_T):
        y = tl.zeros((BLOCK_C,), tl.float32)
        for tap in tl.static_range(L):
            x = inputs[i + tap].to(tl.float32)
            if HAS_STATE and i + tap < Y:
                if first == 0:
                    x += tl.load(before + (i + tap) * before_stride_Y + c, mask=in_C, other=0)
            y += x * taps[tap]
        y += bias
        if SILU:
            y = y / (1 + tl.exp2(-LOG2E * y))
        tl.store(y_at + i * C, y.to(y_BTC.dtype.element_ty), mask=in_C & (first + i < T))

    if Y > 0:
        if first == 0:
            count = tl.load(valid_B + b).to(tl.int32) if HAS_VALID else T
            row = tl.arange(0, BLOCK_Y)
            last = count + row - Y
            in_x = ((row < Y) & (last >= 0))[:, None] & in_C[None, :]
            after = tl.load(x_row + last.to(tl.int64)[:, None] * x_stride_T + c[None, :], mask=in_x, other=0).to(tl.float32)
            if HAS_STATE:
                in_state = ((row < Y) & (last < 0))[:, None] & in_C[None, :]
                after += tl.load(before + (last + Y)[:, None] * before_stride_Y + c[None, :], mask=in_state, other=0)
                tl.debug_barrier()  # every thread has read the state before one writes it
            after_at = after_BYC + b * after_stride_B + row[:, None] * after_stride_Y + c[None, :]
            tl.store(after_at, after, mask=(row < Y)[:, None] & in_C[None, :])
