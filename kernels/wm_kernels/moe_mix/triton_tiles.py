"""Mixtures of many tokens: picks sorted by expert, then products of tiles of one expert's picks with its matrices.

M tokens   k picks   N = M k picks   E experts   D model   I inner width   F rows of an expert's input matrix: I, or 2 I where gated
S segments of picks   R rows of a tile

Picks of an expert stay in their order, and every sum has one order: the same call gives the same bits.
"""

import triton
import triton.language as tl

from wm_kernels.expert_mix.triton_kernel import activate


@triton.jit(do_not_specialize=["N"])
def moe_count_kernel(expert_N, count_SE, N, E: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_E: tl.constexpr):
    """How many picks of a segment each expert has."""
    s = tl.program_id(0)
    n = s * SEGMENT + tl.arange(0, SEGMENT)
    expert = tl.load(expert_N + n, mask=n < N, other=E).to(tl.int32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(count_SE + s.to(tl.int64) * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["S"])
def moe_offset_kernel(count_SE, end_E, S, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """In the place of each count, where the expert's picks of that segment begin; and where those of the expert end. One program."""
    e, row = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_E,), tl.int32)
    first = 0
    while first < S:
        s = first + row
        at = count_SE + s.to(tl.int64)[:, None] * E + e[None, :]
        total += tl.sum(tl.load(at, mask=(s < S)[:, None] & (e < E)[None, :], other=0), 0)
        first += BLOCK_S
    end = tl.cumsum(total, 0)
    tl.store(end_E + e, end, mask=e < E)
    before = end - total
    first = 0
    while first < S:
        s = first + row
        at = count_SE + s.to(tl.int64)[:, None] * E + e[None, :]
        inside = (s < S)[:, None] & (e < E)[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        before += tl.sum(count, 0)
        first += BLOCK_S


@triton.jit(do_not_specialize=["N"])
def moe_sort_kernel(expert_N, begin_SE, pick_N, N, E: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """The picks of a segment to their places, which are in the order of experts, then of picks."""
    s = tl.program_id(0)
    n = s * SEGMENT + tl.arange(0, SEGMENT)
    expert = tl.load(expert_N + n, mask=n < N, other=E).to(tl.int32)
    rank = tl.zeros((SEGMENT,), tl.int32)
    for first in range(0, SEGMENT, BLOCK):
        other_n = s * SEGMENT + first + tl.arange(0, BLOCK)
        other = tl.load(expert_N + other_n, mask=other_n < N, other=E).to(tl.int32)
        rank += tl.sum(((other[None, :] == expert[:, None]) & (other_n[None, :] < n[:, None])).to(tl.int32), 1)
    begin = tl.load(begin_SE + s.to(tl.int64) * E + expert, mask=n < N, other=0)
    tl.store(pick_N + begin + rank, n, mask=n < N)


@triton.jit
def _tile(end_E, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr):
    """Expert, first place and end of the places of a tile; the expert of a tile that is not there is E."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(end_E + e, mask=e < E, other=0)
    begin = tl.load(end_E + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, tl.cdiv(end - begin, BLOCK_R), 0)
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (e < E)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, begin, 0), 0) + (tile - before) * BLOCK_R
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def moe_tile_hidden_kernel(
    x_MD, pick_N, end_E, in_EFD, in_bias_EF, hidden_NI, x_stride, in_stride_E, in_stride_F, bias_stride,
    E: tl.constexpr, D: tl.constexpr, I: tl.constexpr, k: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden = act(W_in x + b_in) of a tile of sorted picks, or act of the first half times the second: BLOCK_I of its columns."""
    expert, first, end = _tile(end_E, tl.program_id(0), E, BLOCK_E, BLOCK_R)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_R)
    there = place < end
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    token = tl.load(pick_N + place, mask=there, other=0) // k
    d = tl.arange(0, BLOCK_D)
    e = expert.to(tl.int64)
    x_at = x_MD + token.to(tl.int64)[:, None] * x_stride + d[None, :]
    in_at = in_EFD + e * in_stride_E + i.to(tl.int64)[:, None] * in_stride_F + d[None, :]
    half = tl.full((), I, tl.int64) * in_stride_F
    gate = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    other = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for start in range(0, D, BLOCK_D):
        in_D = (d < D - start)[None, :]
        x = tl.load(x_at + start, mask=there[:, None] & in_D, other=0)
        rows = tl.load(in_at + start, mask=(i < I)[:, None] & in_D, other=0)
        gate = tl.dot(x, tl.trans(rows), gate, input_precision=PRECISION)
        if GATED:
            rows = tl.load(in_at + half + start, mask=(i < I)[:, None] & in_D, other=0)
            other = tl.dot(x, tl.trans(rows), other, input_precision=PRECISION)
    bias_at = in_bias_EF + e * bias_stride + i
    if HAS_BIAS:
        gate += tl.load(bias_at, mask=i < I, other=0).to(tl.float32)[None, :]
    hidden = activate(gate, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            other += tl.load(bias_at + I, mask=i < I, other=0).to(tl.float32)[None, :]
        hidden *= other
    at = hidden_NI + place.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, hidden.to(hidden_NI.dtype.element_ty), mask=there[:, None] & (i < I)[None, :])


@triton.jit
def moe_tile_outer_kernel(
    hidden_NI, pick_N, end_E, weight_N, out_EDI, out_bias_ED, out_ND, out_stride_E, out_stride_D, bias_stride,
    E: tl.constexpr, D: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weight (W_out hidden + b_out) of a tile of sorted picks, into the rows of the picks: BLOCK_D of its columns."""
    expert, first, end = _tile(end_E, tl.program_id(0), E, BLOCK_E, BLOCK_R)
    if expert >= E:
        return
    place = first + tl.arange(0, BLOCK_R)
    there = place < end
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_I)
    e = expert.to(tl.int64)
    hidden_at = hidden_NI + place.to(tl.int64)[:, None] * I + i[None, :]
    out_at = out_EDI + e * out_stride_E + d.to(tl.int64)[:, None] * out_stride_D + i[None, :]
    out = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, I, BLOCK_I):
        in_I = (i < I - start)[None, :]
        hidden = tl.load(hidden_at + start, mask=there[:, None] & in_I, other=0)
        rows = tl.load(out_at + start, mask=(d < D)[:, None] & in_I, other=0)
        out = tl.dot(hidden, tl.trans(rows), out, input_precision=PRECISION)
    if HAS_BIAS:
        out += tl.load(out_bias_ED + e * bias_stride + d, mask=d < D, other=0).to(tl.float32)[None, :]
    pick = tl.load(pick_N + place, mask=there, other=0)
    out *= tl.load(weight_N + pick, mask=there, other=0).to(tl.float32)[:, None]
    at = out_ND + pick.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, out.to(out_ND.dtype.element_ty), mask=there[:, None] & (d < D)[None, :])


@triton.jit
def moe_sum_kernel(out_ND, y_MD, D: tl.constexpr, k: tl.constexpr, BLOCK_D: tl.constexpr):
    """y[m] = sum of the rows of its picks, in their order. Both are contiguous."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.static_range(k):
        y += tl.load(out_ND + (m * k + n) * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(y_MD + m * D + d, y.to(y_MD.dtype.element_ty), mask=d < D)
