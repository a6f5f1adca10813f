"""Attention with rotary positions, from one packed projection.

B batch   T tokens   H query heads   K key/value heads   P head dimension   F rotated pairs   S cache capacity
E = H·P output width   C = (H + 2K)·P packed width
"""

import torch
from torch import Tensor

from wm_kernels._registration import check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.attention.definition import attend_in_place, attend_without_cache, attention_reference, check_attention
from wm_kernels.rope.definition import rope_reference
from wm_kernels.triton_support import served


def attention_rope_reference(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys by each token's position, write keys and values into the cache, attend causally.

        q, k, v = split(qkv)        cache[position + t] = (rot_t(k_t), v_t)
        out_t = sum_s softmax_s(rot_t(q_t) · rot_s(k_s) / sqrt(P)) v_s,  s <= position + t

    Query head h reads kv head h // (H/K). Without a cache, the T tokens attend to each other.

    Args:
        qkv_BTC: all query heads, then all key heads, then all value heads, not yet rotated; any float dtype.
        cos_BTF: cosines from `rope_angles`; 2F <= P; the first 2F entries of queries and keys are rotated as in `rope`. Equal positions
            have equal angles in all rows, which holds but for dynamic scaling: the onnxruntime body has one table for all.
        sin_BTF: sines from `rope_angles`.
        cache_k_BKSP: rotated keys so far, or None. Cells at or past the position are undefined but must be finite.
        cache_v_BKSP: values so far, or None.
        position_B: cells in use before the call, int64; position + T <= S. Given if and only if the caches are.
        valid_B: tokens of each row that count, int64; None is T. Outputs of later tokens are finite and without meaning, and
            their keys go to cells past the valid ones, which are undefined.
        n_head: query heads (H).
        n_kv_head: key/value heads (K).
        head_dim: width of a head (P); C = (H + 2K)·P.

    Returns:
        (out_BTE, cache_k_BKSP, cache_v_BKSP) in the dtype of qkv; without a cache the last two are empty, of shape (B, K, 0, P).

    Raises:
        RuntimeError: shapes or dtypes disagree, C is not (H + 2K)·P, H is not a multiple of K, 2F > P, or only some of cache and
            position are given.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, eq. (1); rotation: Su et al. 2021, arXiv:2104.09864, eq. (34); shared kv heads: Ainslie
        et al. 2023, arXiv:2305.13245.
    """
    qkv = _rotated("attention_rope", qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    out_BTHP, cache_k, cache_v = attention_reference(*qkv, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    return out_BTHP.flatten(2), cache_k, cache_v


def _split(op: str, qkv_BTC: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, n_head: int, n_kv_head: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Queries and keys to rotate, [B, T, H + K, P], and v_BTKP."""
    size = check_shapes(op, qkv_BTC=qkv_BTC, cos_BTF=cos_BTF, sin_BTF=sin_BTF)
    # The sizes of heads are given, not divided out of C, so that they stay plain numbers where torch.compile makes C a symbol.
    width = (n_head + 2 * n_kv_head) * head_dim
    check_that(op, size["C"] == width, lambda: f"qkv_BTC is {size['C']} wide, expected (H + 2K)·P = {width}")
    check_that(op, 2 * size["F"] <= head_dim, lambda: f"2F = {2 * size['F']} entries are rotated, expected at most P = {head_dim}")
    q_and_k = n_head + n_kv_head
    qk_BTC, v_BTC = qkv_BTC.split([q_and_k * head_dim, n_kv_head * head_dim], 2)
    qk_BTHP, v_BTKP = qk_BTC.unflatten(2, (q_and_k, head_dim)), v_BTC.unflatten(2, (n_kv_head, head_dim))
    return qk_BTHP, v_BTKP


def _rotated(
    op: str, qkv_BTC: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, n_head: int, n_kv_head: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """rot(q)_BTHP, rot(k)_BTKP, v_BTKP."""
    qk_BTHP, v_BTKP = _split(op, qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    q_BTHP, k_BTKP = rope_reference(qk_BTHP, cos_BTF, sin_BTF).split([n_head, n_kv_head], 2)
    return q_BTHP, k_BTKP, v_BTKP


@torch.library.custom_op("wm::attention_rope", mutates_args=())
def attention_rope(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_rope_reference`."""
    qkv = _rotated("attention_rope", qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    check_attention("attention_rope", *qkv, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None:
        out, cache_k, cache_v = attend_without_cache(*qkv, valid_B)
    else:
        cache_k = cache_k_BKSP.clone(memory_format=torch.contiguous_format)
        cache_v = cache_v_BKSP.clone(memory_format=torch.contiguous_format)
        out = attend_in_place(*qkv, cache_k, cache_v, position_B)
    return out.contiguous().flatten(2), cache_k, cache_v


@attention_rope.register_fake
def _(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    qk, v = _split("attention_rope", qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    q, k = qk.split([n_head, n_kv_head], 2)
    check_attention("attention_rope", q, k, v, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    shape = (k.shape[0], n_kv_head, 0, head_dim) if cache_k_BKSP is None else cache_k_BKSP.shape
    return qkv_BTC.new_empty((*q.shape[:2], n_head * head_dim)), qkv_BTC.new_empty(shape), qkv_BTC.new_empty(shape)


register_reference_autograd(attention_rope, attention_rope_reference)


@torch.library.custom_op("wm::attention_rope_", mutates_args=("cache_k_BKSP", "cache_v_BKSP"))
def attention_rope_(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> Tensor:
    """`attention_rope` that writes T cells of the given caches and copies nothing; see `attention_rope_reference`."""
    qkv = _rotated("attention_rope_", qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    check_attention("attention_rope_", *qkv, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    return attend_in_place(*qkv, cache_k_BKSP, cache_v_BKSP, position_B).contiguous().flatten(2)


@attention_rope_.register_fake
def _(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> Tensor:
    qk, v = _split("attention_rope_", qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
    q, k = qk.split([n_head, n_kv_head], 2)
    check_attention("attention_rope_", q, k, v, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    return qkv_BTC.new_empty((*q.shape[:2], n_head * head_dim))


def _rotate_themselves(qkv_BTC: Tensor, cos_BTF: Tensor, *caches: Tensor) -> bool:
    """Whether Triton's kernels rotate, write and attend: rows of caches that are not contiguous would be copied for them."""
    return served(qkv_BTC, cos_BTF) and bool(cos_BTF.numel()) and all(cache.stride(-1) == 1 for cache in caches)


@register_kernel(attention_rope, "cuda")
def _(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (n_head, n_kv_head, head_dim)
    if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None or not _rotate_themselves(qkv_BTC, cos_BTF):
        return attention_rope._init_fn(qkv_BTC, cos_BTF, sin_BTF, cache_k_BKSP, cache_v_BKSP, position_B, valid_B, *heads)
    cache_k = cache_k_BKSP.clone(memory_format=torch.contiguous_format)
    cache_v = cache_v_BKSP.clone(memory_format=torch.contiguous_format)
    out = _by_kernels("attention_rope", qkv_BTC, cos_BTF, sin_BTF, cache_k, cache_v, position_B, valid_B, *heads)
    return out, cache_k, cache_v


@register_kernel(attention_rope_, "cuda")
def _(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> Tensor:
    arguments = (qkv_BTC, cos_BTF, sin_BTF, cache_k_BKSP, cache_v_BKSP, position_B, valid_B, n_head, n_kv_head, head_dim)
    if not _rotate_themselves(qkv_BTC, cos_BTF, cache_k_BKSP, cache_v_BKSP):
        return attention_rope_._init_fn(*arguments)
    return _by_kernels("attention_rope_", *arguments)


def _by_kernels(
    op: str,
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
) -> Tensor:
    """`attention_rope_` by Triton's kernels."""
    from wm_kernels.attention_rope.triton_op import attend_packed_triton

    caches = (cache_k_BKSP, cache_v_BKSP)

    def check() -> None:
        qk, v = _split(op, qkv_BTC, cos_BTF, sin_BTF, n_head, n_kv_head, head_dim)
        q, k = qk.split([n_head, n_kv_head], 2)
        check_attention(op, q, k, v, *caches, position_B, valid_B)

    return attend_packed_triton(qkv_BTC, cos_BTF, sin_BTF, *caches, position_B, n_head, (check, (valid_B,)))
