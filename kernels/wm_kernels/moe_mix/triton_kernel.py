"""What lies between and after the grouped products of moe_mix.

M tokens   k picks   N = M k picks, sorted by expert   D model   I inner width   F rows of an expert's input matrix: I, or 2 I where gated
"""

import triton
import triton.language as tl

from wm_kernels.expert_mix.triton_kernel import activate


@triton.jit(do_not_specialize=["N"])
def moe_hidden_kernel(
    inner_NF, in_bias_EF, expert_N, hidden_NI, N,
    I: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """hidden = act(inner + bias), or act of the first half times the second. All tensors are contiguous."""
    F: tl.constexpr = 2 * I if GATED else I
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    inside = (row < N)[:, None] & (col < I)
    row_64 = row.to(tl.int64)[:, None]
    expert = tl.load(expert_N + row, mask=row < N, other=0)[:, None]
    hidden = tl.load(inner_NF + row_64 * F + col, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        hidden += tl.load(in_bias_EF + expert * F + col, mask=inside, other=0).to(tl.float32)
    hidden = activate(hidden, ACTIVATION)
    if GATED:
        other = tl.load(inner_NF + row_64 * F + I + col, mask=inside, other=0).to(tl.float32)
        if HAS_BIAS:
            other += tl.load(in_bias_EF + expert * F + I + col, mask=inside, other=0).to(tl.float32)
        hidden *= other
    tl.store(hidden_NI + row_64 * I + col, hidden.to(hidden_NI.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def moe_combine_kernel(
    out_ND, out_bias_ED, expert_Mk, weight_Mk, place_Mk, y_MD, M,
    D: tl.constexpr, k: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[m] = sum over the picks, in their order, of weight (out[place] + bias of the expert). All tensors are contiguous."""
    m = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = col < D
    y = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.static_range(k):
        place = tl.load(place_Mk + m * k + n)
        out = tl.load(out_ND + place * D + col, mask=in_D, other=0).to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(expert_Mk + m * k + n)
            out += tl.load(out_bias_ED + expert * D + col, mask=in_D, other=0).to(tl.float32)
        y += tl.load(weight_Mk + m * k + n).to(tl.float32) * out
    tl.store(y_MD + m * D + col, y.to(y_MD.dtype.element_ty), mask=in_D)
