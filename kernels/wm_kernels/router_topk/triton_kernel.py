"""Choice of a token's experts by a router. M tokens, E experts, k picks, K k up to a power of two."""

import triton
import triton.language as tl

from wm_kernels.product_key_topk.triton_kernel import select

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["M"])
def router_topk_kernel(
    logits_ME, weight_Mk, expert_Mk, M, stride,
    E: tl.constexpr, k: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens: the k largest logits, and softmax over all or over these. Outputs are contiguous."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_64 = m.to(tl.int64)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (m < M)[:, None] & (e < E)
    logits = tl.load(logits_ME + m_64 * stride + e, mask=inside, other=0).to(tl.float32)
    logits = tl.where(e < E, logits, float("-inf"))
    best, expert = select(logits, tl.broadcast_to(e, (BLOCK_M, BLOCK_E)), k, K)
    col = tl.arange(0, K)[None, :]
    top = tl.max(best, 1)[:, None]
    weight = tl.where(col < k, tl.exp2((best - top) * LOG2E), 0.0)
    if NORMALIZE:
        total = tl.sum(weight, 1)
    else:
        total = tl.sum(tl.where(e < E, tl.exp2((logits - top) * LOG2E), 0.0), 1)
    weight = weight / total[:, None]
    at = m_64 * k + col
    chosen = (m < M)[:, None] & (col < k)
    tl.store(weight_Mk + at, weight.to(weight_Mk.dtype.element_ty), mask=chosen)
    # Logits that are no numbers choose nothing; their indices stay in range.
    tl.store(expert_Mk + at, tl.minimum(expert, E - 1).to(tl.int64), mask=chosen)
