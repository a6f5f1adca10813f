"""Selective scan of Mamba-1. B batch, T tokens, C channels, N state, K chunks of tokens.

    S_t = exp(dt_t A) * S_{t-1} + dt_t x_t ⊗ B_t        y_t = S_t C_t

A program holds the states of BLOCK_C channels as [BLOCK_C, N], so that a thread has all N of a channel and sums over them by itself. The
compiler would lay such a tile out by what lies side by side in memory, which differs from tensor to tensor, and move it between layouts at
every token. ONE is the integer 1, but not known to the compiler: multiplied by it, no axis seems to lie side by side. For a single token
the layout of memory is the better one, so that it has a kernel of its own.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def selective_step_kernel(
    x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, valid_B, before, y_BTC, after,
    x_stride_B, x_stride_T, dt_stride_B, dt_stride_T, A_stride, B_stride_B, B_stride_T, C_stride_B, C_stride_T,
    before_stride_B, before_stride_C, after_stride_B, after_stride_C,
    C: tl.constexpr, N: tl.constexpr, HAS_VALID: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token. Grid: B * tiles of C."""
    b = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    c = (tl.program_id(0) % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    in_C = c < C
    in_N = n < N
    inside = in_C[:, None] & in_N[None, :]
    live = tl.load(valid_B + b) > 0 if HAS_VALID else True
    state = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    if HAS_STATE:
        state = tl.load(before + b * before_stride_B + c[:, None] * before_stride_C + n[None, :], mask=inside, other=0)
    A = tl.load(A_CN + c[:, None] * A_stride + n[None, :], mask=inside, other=0)
    A = tl.minimum(A, 0.0) * LOG2E
    # A token that does not count is read as zeros.
    x = tl.load(x_BTC + b * x_stride_B + c, mask=in_C & live, other=0).to(tl.float32)
    dt = tl.maximum(tl.load(dt_BTC + b * dt_stride_B + c, mask=in_C & live, other=0), 0.0)
    B = tl.load(B_BTN + b * B_stride_B + n, mask=in_N & live, other=0).to(tl.float32)
    read = tl.load(C_BTN + b * C_stride_B + n, mask=in_N & live, other=0).to(tl.float32)
    state = tl.exp2(dt[:, None] * A) * state + (dt * x)[:, None] * B[None, :]
    y = tl.sum(state * read[None, :], 1)
    tl.store(y_BTC + b * C + c, y.to(y_BTC.dtype.element_ty), mask=in_C)
    tl.debug_barrier()  # every thread has read the state before one writes it
    tl.store(after + b * after_stride_B + c[:, None] * after_stride_C + n[None, :], state, mask=inside)


@triton.jit
def _column(tile, u, k: tl.constexpr):
    """One column of a tile whose rows each belong to one thread: it has that entry, and the compiler sees that the others are zeros."""
    return tl.sum(tl.where(u[None, :] == k, tile.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T", "CHUNK", "ONE"])
def selective_scan_kernel(
    x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, valid_B, before, y_BTC, after, total_BKC, T, CHUNK, ONE,
    x_stride_B, x_stride_T, dt_stride_B, dt_stride_T, A_stride, B_stride_B, B_stride_T, C_stride_B, C_stride_T,
    before_stride_B, before_stride_C, after_stride_B, after_stride_C,
    C: tl.constexpr, N: tl.constexpr, HAS_VALID: tl.constexpr, HAS_STATE: tl.constexpr, PART: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """CHUNK tokens of BLOCK_C channels. Grid: B * tiles of C, chunks; the first axis alone has no limit of 65535.

    PART is "whole" where one chunk holds all tokens: from the state `before`, outputs and the state `after`. Otherwise it is "states", from
    zero, for all chunks but the last: `after` is then [B, K, N, C], whose entry k + 1 gets what chunk k contributes, and the sum of its
    steps is kept; and then "outputs", where `before` [B, K, N, C] holds the states at the chunks' beginnings.
    """
    b = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    chunk = tl.program_id(1)
    c = (tl.program_id(0) % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    in_C = c < C
    in_N = n < N
    inside = in_C[:, None] & in_N[None, :]
    A = tl.load(A_CN + c[:, None] * A_stride + n[None, :] * ONE, mask=inside, other=0)
    A = tl.minimum(A, 0.0) * LOG2E
    slot = b * tl.num_programs(1) + chunk
    if PART == "states":
        slot += b + 1  # there is one slot more than programs
    place = slot * N * C + n[None, :] * C + c[:, None] * ONE
    state_at = before + b * before_stride_B + c[:, None] * before_stride_C + n[None, :] * ONE
    if PART == "outputs":
        state = tl.load(before + place, mask=inside, other=0)
    elif PART == "whole" and HAS_STATE:
        state = tl.load(state_at, mask=inside, other=0)
    else:
        state = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)

    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, T)
    # A token that does not count is read as zeros: it changes no state, whatever it holds.
    live = tl.minimum(end, tl.load(valid_B + b).to(tl.int32)) if HAS_VALID else end
    start = first.to(tl.int64)
    u = tl.arange(0, AHEAD)
    x_at = x_BTC + b * x_stride_B + (start + u[None, :]) * x_stride_T + c[:, None] * ONE
    dt_at = dt_BTC + b * dt_stride_B + (start + u[None, :]) * dt_stride_T + c[:, None] * ONE
    B_at = B_BTN + b * B_stride_B + start * B_stride_T + n
    C_at = C_BTN + b * C_stride_B + start * C_stride_T + n
    y_at = y_BTC + (b * T + start + u[None, :]) * C + c[:, None] * ONE
    # What comes next is read before it is needed, AHEAD tokens of x and dt and two of B and C: the memory's delay passes during the
    # arithmetic, so that few programs suffice.
    x_next = tl.load(x_at, mask=in_C[:, None] & (first + u < live)[None, :], other=0)
    dt_next = tl.load(dt_at, mask=in_C[:, None] & (first + u < live)[None, :], other=0)
    B_first, C_first = tl.load(B_at, mask=in_N & (first < live), other=0), tl.load(C_at, mask=in_N & (first < live), other=0)
    B_at += B_stride_T
    C_at += C_stride_T
    B_second, C_second = tl.load(B_at, mask=in_N & (first + 1 < live), other=0), tl.load(C_at, mask=in_N & (first + 1 < live), other=0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(first, end, AHEAD):
        x, dt = x_next.to(tl.float32), tl.maximum(dt_next, 0.0)
        x_at += AHEAD * x_stride_T
        dt_at += AHEAD * dt_stride_T
        more = in_C[:, None] & (t + AHEAD + u < live)[None, :]
        x_next = tl.load(x_at, mask=more, other=0)
        dt_next = tl.load(dt_at, mask=more, other=0)
        y = tl.zeros((BLOCK_C, AHEAD), tl.float32)
        for k in tl.static_range(AHEAD):
            B, read = B_first.to(tl.float32), C_first.to(tl.float32)
            B_first, C_first = B_second, C_second
            B_at += B_stride_T
            C_at += C_stride_T
            B_second = tl.load(B_at, mask=in_N & (t + k + 2 < live), other=0)
            C_second = tl.load(C_at, mask=in_N & (t + k + 2 < live), other=0)
            step = _column(dt, u, k)
            decay = tl.exp2(step[:, None] * A)
            state = decay * state + (step * _column(x, u, k))[:, None] * B[None, :]
            if PART == "states":
                total += step
            else:
                y = tl.where(u[None, :] == k, tl.sum(state * read[None, :], 1)[:, None], y)
        if PART != "states":
            tl.store(y_at, y.to(y_BTC.dtype.element_ty), mask=in_C[:, None] & (t + u < end)[None, :])
            y_at += AHEAD * C
    # Not times ONE: where a thread wrote a row by itself, every entry would go to memory alone.
    to = after + b * after_stride_B + c[:, None] * after_stride_C + n[None, :]
    if PART == "states":
        tl.store(after + place, state, mask=inside)
        tl.store(total_BKC + slot * C + c, total, mask=in_C)
    elif PART == "whole":
        tl.debug_barrier()  # every thread has read the state before one writes it
        tl.store(to, state, mask=inside)
    elif chunk == tl.num_programs(1) - 1:
        tl.store(to, state, mask=inside)


@triton.jit(do_not_specialize=["K", "ONE"])
def selective_scan_carry_kernel(
    A_CN, before, states_BKNC, total_BKC, K, ONE, A_stride, before_stride_B, before_stride_C,
    C: tl.constexpr, N: tl.constexpr, HAS_STATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Slot 0 becomes the initial state; in slot k, what chunk k - 1 contributes becomes the state at the beginning of chunk k.

    Grid: B * tiles of C.
    """
    b = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    c = (tl.program_id(0) % tl.cdiv(C, BLOCK_C)) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    in_C = c < C
    inside = in_C[:, None] & (n < N)[None, :]
    A = tl.load(A_CN + c[:, None] * A_stride + n[None, :] * ONE, mask=inside, other=0)
    A = tl.minimum(A, 0.0) * LOG2E
    if HAS_STATE:
        state = tl.load(before + b * before_stride_B + c[:, None] * before_stride_C + n[None, :] * ONE, mask=inside, other=0)
    else:
        state = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    place = states_BKNC + b * K * N * C + n[None, :] * C + c[:, None] * ONE
    total_at = total_BKC + b * K * C + c
    tl.store(place, state, mask=inside)
    place += N * C
    total_at += C
    own_next = tl.load(place, mask=inside, other=0)
    total_next = tl.load(total_at, mask=in_C, other=0)
    for slot in range(1, K):
        own, total = own_next, total_next
        total_at += C
        own_next = tl.load(place + N * C, mask=inside & (slot + 1 < K), other=0)
        total_next = tl.load(total_at, mask=in_C & (slot + 1 < K), other=0)
        state = tl.exp2(total[:, None] * A) * state + own
        tl.store(place, state, mask=inside)
        place += N * C
