"""Triton kernels of the state space duality scan, with and without rotated B and C.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs   Q tokens of one chunk (also its source axis: q)
J chunks   K segments of consecutive chunks; slot k of a row and head is the state at the start of segment k

States are held transposed, [P, N], while chunks are walked: as a product leaves one in registers, it is the left operand of the next. So
neither states nor decayed inputs pass through shared memory, where tensor cores would wait for the stores.

A prefill is `prepare` for all chunks at once, then `scan_segments`; with K > 1 `segment_states` comes between, and perhaps `carry_states`.
One token is `scan_tokens`.
"""

import triton
import triton.language as tl

from wm_kernels.triton_early import wait_for_predecessor

LOG2E = tl.constexpr(1.4426950408889634)
FORGETS = tl.constexpr(-160.0)  # 2^-160 is 0 in float32; the bound keeps a chunk's sums small enough to be exact
LEAST = tl.constexpr(2.0**-126)  # where a factor dt becomes a term of an exponent: the smallest normal number, for 0
GRID = tl.constexpr(256.0)  # log decays are cut into multiples of 1/256, whose sums are exact, and a remainder


@triton.jit
def _log_decay(dt, rate):
    """log2 of a token's decay: never above 0, and no lower than what float32 can tell from 0."""
    return tl.minimum(tl.maximum(dt * rate, FORGETS), 0.0)


@triton.jit
def _tile(ptr, row_stride, rows, columns, row_count, column_count, EVEN: tl.constexpr):
    """A tile of rows `row_stride` apart; 0 outside. EVEN: no column is outside."""
    mask = (rows < row_count)[:, None]
    if not EVEN:
        mask = mask & (columns < column_count)[None, :]
    return tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rotated(to_ptr, low, high, cos_QF, sin_QF, q, f, count, N: tl.constexpr, F: tl.constexpr):
    """Two halves to contiguous rows of N, rotated in float32 and rounded once."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    mask = (q < count)[:, None] & (f < F)[None, :]
    at = to_ptr + q[:, None] * N + f[None, :]
    tl.store(at, (low * cos_QF - high * sin_QF).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(at + F, (high * cos_QF + low * sin_QF).to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "dt_b"])
def prepare(
    dt_ptr, A_ptr, B_ptr, C_ptr, cos_ptr, sin_ptr, valid_ptr, step_ptr, sum_ptr, left_ptr, B_rot_ptr, C_rot_ptr,
    T, dt_b, dt_t, dt_h, A_h, B_b, B_g, C_b, C_g, cos_b, sin_b,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, F: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
    B_t: tl.constexpr, C_t: tl.constexpr, cos_t: tl.constexpr, sin_t: tl.constexpr, SHARES: tl.constexpr,
    HAS_VALID: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What chunks need before they meet: log2 decays since the chunk's start as [B, H, J * Q], step sizes, rotated B and C as [B, G, T, N].

    dt_s exp(a_s+1 + .. + a_t) is later taken from differences of running sums, which lose a small segment after a strong decay. With EXACT
    none is lost: multiples of 1/256 add up exactly, and what is left of them stays small and has its own sum. Half precision does without
    and keeps, in place of dt_s, the sum up to s less log2(dt_s), so that one exponent makes the factor.

    Grid: B * J * SHARES; the SHARES programs of a chunk, which run side by side, divide its heads and groups and read whole rows.
    """
    share = tl.program_id(0) % SHARES
    chunks = tl.cdiv(T, BLOCK_Q)
    chunk = (tl.program_id(0) // SHARES) % chunks
    b = (tl.program_id(0) // SHARES // chunks).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    padded = (zero + chunks) * BLOCK_Q
    at = (zero + chunk) * BLOCK_Q
    valid = T
    if HAS_VALID:
        valid = tl.minimum(tl.load(valid_ptr + b), T).to(tl.int32)
    count = valid - chunk * BLOCK_Q
    q = tl.arange(0, BLOCK_Q)
    for first in tl.range(share * BLOCK_H, H, SHARES * BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        rate_H = tl.load(A_ptr + h * A_h, mask=h < H, other=0.0) * LOG2E
        mask = (q < count)[:, None] & (h < H)[None, :]
        dt_QH = tl.load(dt_ptr + b * dt_b + at * dt_t + q[:, None] * dt_t + h[None, :] * dt_h, mask=mask, other=0.0)
        a_QH = _log_decay(dt_QH, rate_H[None, :])
        to = (b * H + h[None, :]) * padded + at + q[:, None]
        within = (h < H)[None, :]
        if EXACT:
            tl.store(step_ptr + to, dt_QH, mask=within)
            coarse_QH = tl.floor(a_QH * GRID + 0.5) / GRID
            tl.store(sum_ptr + to, tl.cumsum(coarse_QH, 0), mask=within)
            tl.store(left_ptr + to, tl.cumsum(a_QH - coarse_QH, 0), mask=within)
        else:
            sum_QH = tl.cumsum(a_QH, 0)
            tl.store(sum_ptr + to, sum_QH, mask=within)
            tl.store(step_ptr + to, sum_QH - tl.log2(tl.maximum(dt_QH, LEAST)), mask=within)
    if F > 0:
        f = tl.arange(0, BLOCK_F)
        n = tl.arange(0, BLOCK_N)
        cos_QF = _tile(cos_ptr + b * cos_b + at * cos_t, cos_t, q, f, count, F, F == BLOCK_F).to(tl.float32)
        sin_QF = _tile(sin_ptr + b * sin_b + at * sin_t, sin_t, q, f, count, F, F == BLOCK_F).to(tl.float32)
        for g in tl.range(share, G, SHARES):
            to = ((b * G + g) * T + at) * N
            B_at = B_ptr + b * B_b + at * B_t + g * B_g
            C_at = C_ptr + b * C_b + at * C_t + g * C_g
            # All loads are under way before the first store.
            B_low = _tile(B_at, B_t, q, f, count, F, F == BLOCK_F)
            B_high = _tile(B_at + F, B_t, q, f, count, F, F == BLOCK_F)
            C_low = _tile(C_at, C_t, q, f, count, F, F == BLOCK_F)
            C_high = _tile(C_at + F, C_t, q, f, count, F, F == BLOCK_F)
            _store_rotated(B_rot_ptr + to, B_low, B_high, cos_QF, sin_QF, q, f, count, N, F)
            _store_rotated(C_rot_ptr + to, C_low, C_high, cos_QF, sin_QF, q, f, count, N, F)
            if N > 2 * F:
                mask = (q < count)[:, None] & ((n >= 2 * F) & (n < N))[None, :]
                row = to + q[:, None] * N + n[None, :]
                tl.store(B_rot_ptr + row, tl.load(B_at + q[:, None] * B_t + n[None, :], mask=mask, other=0.0), mask=mask)
                tl.store(C_rot_ptr + row, tl.load(C_at + q[:, None] * C_t + n[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit
def _weight(whole, left, step_Q, sum_Q, left_Q, EXACT: tl.constexpr):
    """dt of each token times the decay from it to the chunk's end."""
    if EXACT:
        return step_Q * tl.exp2(tl.minimum((whole - sum_Q) + (left - left_Q), 0.0))
    else:
        return tl.exp2(whole - step_Q)


@triton.jit
def _left(ptr, at, EXACT: tl.constexpr):
    if EXACT:
        return tl.load(ptr + at)
    else:
        return 0.0


@triton.jit
def _state_at(ptr, n_stride, n, p):
    """Addresses of a state, transposed."""
    return ptr + n[None, :] * n_stride + p[:, None]


@triton.jit
def _state_mask(n, p, N: tl.constexpr, P: tl.constexpr):
    return (n < N)[None, :] & (p < P)[:, None]


@triton.jit
def _added(state_PN, decay, weight_Q, x_QP, B_QN):
    """decay * S + B^T (weight x), transposed."""
    x_PQ = (tl.trans(x_QP).to(tl.float32) * weight_Q[None, :]).to(x_QP.dtype)
    return tl.dot(x_PQ, B_QN, state_PN * decay, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "segment"])
def segment_states(
    x_ptr, B_ptr, step_ptr, sum_ptr, left_ptr, valid_ptr, state_ptr, slot_ptr, decay_ptr,
    T, segment, x_b, x_h, B_b, B_g, state_b, state_h, state_n,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, x_t: tl.constexpr, B_t: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Slot k > 0: what segment k - 1 adds to a zero state, and its decay; slot 0: the initial state.

    Grid: B * H * tiles of P, K with an initial state and K - 1 without. The last segment has no successor and is left out.
    """
    p = (tl.program_id(0) % tl.cdiv(P, BLOCK_P)) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = (tl.program_id(0) // tl.cdiv(P, BLOCK_P)).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    if HAS_STATE:
        slot = tl.program_id(1)
        segments = tl.num_programs(1)
    else:
        slot = tl.program_id(1) + 1
        segments = tl.num_programs(1) + 1
    b, h = row // H, row % H
    g = h // (H // G)
    valid = T
    if HAS_VALID:
        valid = tl.minimum(tl.load(valid_ptr + b), T).to(tl.int32)
    q = tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    x_ptr += b * x_b + h * x_h
    B_ptr += b * B_b + g * B_g
    padded = (zero + tl.cdiv(T, BLOCK_Q)) * BLOCK_Q
    first = tl.maximum(slot - 1, 0) * segment
    last = tl.minimum(slot * segment, valid)  # nothing at all for slot 0
    mask = _state_mask(n, p, N, P)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_STATE and slot == 0:
        state = tl.load(_state_at(state_ptr + b * state_b + h * state_h, state_n, n, p), mask=mask, other=0.0)
    total = tl.full((), 1.0, tl.float32)
    for start in tl.range(first, last, BLOCK_Q):
        at = zero + start
        here = row * padded + start
        whole = tl.load(sum_ptr + here + BLOCK_Q - 1)
        left = _left(left_ptr, here + BLOCK_Q - 1, EXACT)
        decay = tl.exp2(tl.minimum(whole + left, 0.0))
        step_Q = tl.load(step_ptr + here + q)
        weight_Q = _weight(whole, left, step_Q, tl.load(sum_ptr + here + q), _left(left_ptr, here + q, EXACT), EXACT)
        x_QP = _tile(x_ptr + at * x_t, x_t, q, p, valid - start, P, P % BLOCK_P == 0)
        B_QN = _tile(B_ptr + at * B_t, B_t, q, n, valid - start, N, N == BLOCK_N)
        state = _added(state, decay, weight_Q, x_QP, B_QN)
        total = total * decay
    slot_ptr += (row * segments + slot) * (N * P)
    tl.store(_state_at(slot_ptr, P, n, p), state, mask=mask)
    if tl.program_id(0) % tl.cdiv(P, BLOCK_P) == 0:
        tl.store(decay_ptr + row * segments + slot, total)


@triton.jit(do_not_specialize=["segments"])
def carry_states(slot_ptr, decay_ptr, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_STATE: tl.constexpr):
    """Slots become the states at the starts of their segments, in place. Grid: B * H * tiles of N * P."""
    o = (tl.program_id(0) % tl.cdiv(SIZE, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(0) // tl.cdiv(SIZE, BLOCK)).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    slot_ptr += row * segments * SIZE + o
    decay_ptr += row * segments
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_STATE:
        state = tl.load(slot_ptr, mask=o < SIZE, other=0.0)
    else:
        tl.store(slot_ptr, state, mask=o < SIZE)
    for slot in tl.range(1, segments):
        at = (zero + slot) * SIZE
        state = state * tl.load(decay_ptr + slot) + tl.load(slot_ptr + at, mask=o < SIZE, other=0.0)
        tl.store(slot_ptr + at, state, mask=o < SIZE)


@triton.jit(do_not_specialize=["T", "segment"])
def scan_segments(
    x_ptr, B_ptr, C_ptr, step_ptr, sum_ptr, left_ptr, valid_ptr, state_ptr, slot_ptr, decay_ptr, y_ptr, out_ptr,
    T, segment, x_b, x_h, B_b, B_g, C_b, C_g, state_b, state_h, state_n, out_b, out_h, out_n,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, x_t: tl.constexpr, B_t: tl.constexpr, C_t: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_VALID: tl.constexpr, EXACT: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment with the state in registers: outputs, and from the last segment the final state.

    Grid: B * H * tiles of P, K. START says where the state comes from: "initial" for K = 1, else slots: "carried", or "fold" to add up the
    slots before this segment here. With slots the initial state is slot 0, so that the final state may be written over it.
    """
    p = (tl.program_id(0) % tl.cdiv(P, BLOCK_P)) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = (tl.program_id(0) // tl.cdiv(P, BLOCK_P)).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    slot = tl.program_id(1)
    segments = tl.num_programs(1)
    b, h = row // H, row % H
    g = h // (H // G)
    valid = T
    if HAS_VALID:
        valid = tl.minimum(tl.load(valid_ptr + b), T).to(tl.int32)
    q = tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_N)
    x_ptr += b * x_b + h * x_h
    B_ptr += b * B_b + g * B_g
    C_ptr += b * C_b + g * C_g
    y_ptr += b * T * (H * P) + h * P
    padded = (zero + tl.cdiv(T, BLOCK_Q)) * BLOCK_Q
    mask = _state_mask(n, p, N, P)
    if START == "initial":
        from_at = _state_at(state_ptr + b * state_b + h * state_h, state_n, n, p)
    elif START == "carried":
        from_at = _state_at(slot_ptr + (row * segments + slot) * (N * P), P, n, p)
    else:
        from_at = _state_at(slot_ptr + row * segments * (N * P), P, n, p)
    if HAS_STATE or START == "carried":
        state = tl.load(from_at, mask=mask, other=0.0)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if START == "fold":
        for earlier in tl.range(1, slot + 1):
            decay = tl.load(decay_ptr + row * segments + earlier)
            state = state * decay + tl.load(from_at + (zero + earlier) * (N * P), mask=mask, other=0.0)
    for start in tl.range(slot * segment, tl.minimum((slot + 1) * segment, T), BLOCK_Q):
        at = zero + start
        here = row * padded + start
        count = valid - start
        x_QP = _tile(x_ptr + at * x_t, x_t, q, p, count, P, P % BLOCK_P == 0)
        B_QN = _tile(B_ptr + at * B_t, B_t, q, n, count, N, N == BLOCK_N)
        C_QN = _tile(C_ptr + at * C_t, C_t, q, n, count, N, N == BLOCK_N)
        step_Q = tl.load(step_ptr + here + q)
        sum_Q = tl.load(sum_ptr + here + q)
        left_Q = _left(left_ptr, here + q, EXACT)
        whole = tl.load(sum_ptr + here + BLOCK_Q - 1)
        left = _left(left_ptr, here + BLOCK_Q - 1, EXACT)
        # From the chunk's own tokens. Exponents start from score * 0 to have the layout of the scores: no [Q, Q] tensor changes layout.
        score_Qq = tl.dot(C_QN, tl.trans(B_QN), input_precision="ieee")
        if EXACT:
            exponent_Qq = ((score_Qq * 0.0 + sum_Q[:, None]) - sum_Q[None, :]) + left_Q[:, None] - left_Q[None, :]
            score_Qq *= step_Q[None, :]
        else:
            exponent_Qq = (score_Qq * 0.0 + sum_Q[:, None]) - step_Q[None, :]
        near_Qq = score_Qq * tl.exp2(tl.where(q[:, None] >= q[None, :], exponent_Qq, float("-inf")))
        # From the state at its start; here y * 0 keeps the layout of y, so that it is a vector and no tile whose loads are not pipelined.
        y_QP = tl.dot(near_Qq.to(x_QP.dtype), x_QP, input_precision="ieee")
        far_QP = y_QP * 0.0 + tl.trans(tl.dot(state.to(x_QP.dtype), tl.trans(C_QN), input_precision="ieee"))
        y_QP += far_QP * tl.exp2(tl.minimum(sum_Q + left_Q, 0.0))[:, None]
        weight_Q = _weight(whole, left, step_Q, sum_Q, left_Q, EXACT)
        state = _added(state, tl.exp2(tl.minimum(whole + left, 0.0)), weight_Q, x_QP, B_QN)
        y_mask = (q < T - start)[:, None] & (p < P)[None, :]
        tl.store(y_ptr + at * (H * P) + q[:, None] * (H * P) + p[None, :], y_QP.to(y_ptr.dtype.element_ty), mask=y_mask)
    if slot == segments - 1:
        tl.store(_state_at(out_ptr + b * out_b + h * out_h, out_n, n, p), state, mask=mask)


@triton.jit
def _rotated_vector(ptr, cos_ptr, sin_ptr, n, N: tl.constexpr, F: tl.constexpr):
    """One token's B or C in float32, rotated."""
    value = tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if F > 0:
        upper = n >= F
        paired = n < 2 * F
        partner = tl.load(ptr + tl.where(upper, n - F, n + F), mask=paired, other=0.0).to(tl.float32)
        f = tl.where(upper, n - F, n)
        cos = tl.load(cos_ptr + f, mask=paired, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + f, mask=paired, other=0.0).to(tl.float32)
        value = value * cos + tl.where(upper, partner, -partner) * sin
    return value


@triton.jit(do_not_specialize=["T", "dt_b"])
def scan_tokens(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, cos_ptr, sin_ptr, valid_ptr, state_ptr, y_ptr, out_ptr,
    T, x_b, x_t, x_h, dt_b, dt_t, dt_h, A_h, B_b, B_t, B_g, C_b, C_t, C_g, cos_b, cos_t, sin_b, sin_t,
    state_b, state_h, state_n, out_b, out_h, out_n,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, F: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, HAS_STATE: tl.constexpr, HAS_VALID: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The recurrence itself, token after token, for any T: what T calls of one token give, bit for bit. Grid: B * H * tiles of P."""
    wait_for_predecessor(DEPENDENT)
    p = (tl.program_id(0) % tl.cdiv(P, BLOCK_P)) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = (tl.program_id(0) // tl.cdiv(P, BLOCK_P)).to(tl.int64)
    zero = tl.full((), 0, tl.int64)
    n = tl.arange(0, BLOCK_N)
    b, h = row // H, row % H
    g = h // (H // G)
    mask = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if HAS_STATE:
        state = tl.load(state_ptr + b * state_b + h * state_h + n[:, None] * state_n + p[None, :], mask=mask, other=0.0)
    valid = T
    if HAS_VALID:
        valid = tl.minimum(tl.load(valid_ptr + b), T).to(tl.int32)
    rate = tl.load(A_ptr + h * A_h) * LOG2E
    x_ptr += b * x_b + h * x_h + p
    dt_ptr += b * dt_b + h * dt_h
    B_ptr += b * B_b + g * B_g
    C_ptr += b * C_b + g * C_g
    cos_ptr += b * cos_b
    sin_ptr += b * sin_b
    y_ptr += b * T * (H * P) + h * P + p
    for t in tl.range(0, valid):
        at = zero + t
        dt = tl.load(dt_ptr + at * dt_t)
        x_P = tl.load(x_ptr + at * x_t, mask=p < P, other=0.0).to(tl.float32) * dt
        B_N = _rotated_vector(B_ptr + at * B_t, cos_ptr + at * cos_t, sin_ptr + at * sin_t, n, N, F)
        C_N = _rotated_vector(C_ptr + at * C_t, cos_ptr + at * cos_t, sin_ptr + at * sin_t, n, N, F)
        state = state * tl.exp2(_log_decay(dt, rate)) + B_N[:, None] * x_P[None, :]
        y_P = tl.sum(state * C_N[:, None], 0)
        tl.store(y_ptr + at * (H * P), y_P.to(y_ptr.dtype.element_ty), mask=p < P)
    for t in tl.range(valid, T):  # tokens that do not count
        tl.store(y_ptr + (zero + t) * (H * P), tl.zeros((BLOCK_P,), y_ptr.dtype.element_ty), mask=p < P)
    tl.store(out_ptr + b * out_b + h * out_h + n[:, None] * out_n + p[None, :], state, mask=mask)
