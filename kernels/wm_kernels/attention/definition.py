"""Attention over a cache of fixed capacity.

B batch   T tokens   H query heads   K key/value heads   G = H/K query heads of one kv head   P head dimension
S cache capacity   L cells that are read
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import check_dtype, check_shapes, check_that, check_together, register_kernel, register_reference_autograd
from wm_kernels.numerics import exact
from wm_kernels.triton_support import served


def attention_reference(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the new keys and values into the cache, then attend causally.

        cache[position + t] = (k_t, v_t)        out_t = sum_s softmax_s(q_t · k_s / sqrt(P)) v_s,  s <= position + t

    Query head h reads kv head h // (H/K). Without a cache, the T tokens attend to each other.

    Args:
        q_BTHP: queries, already rotated.
        k_BTKP: keys, already rotated; same dtype.
        v_BTKP: values; same dtype.
        cache_k_BKSP: keys so far, or None. Cells at or past the position are undefined but must be finite.
        cache_v_BKSP: values so far, or None.
        position_B: cells in use before the call, int64; position + T <= S. Given if and only if the caches are.
        valid_B: tokens of each row that count, int64; None is T. Outputs of later tokens are finite and without meaning, and
            their keys go to cells past the valid ones, which are undefined.

    Returns:
        (out_BTHP, cache_k_BKSP, cache_v_BKSP) in the dtype of q; without a cache the last two are empty, of shape (B, K, 0, P).

    Raises:
        RuntimeError: shapes or dtypes disagree, H is not a multiple of K, or only some of cache and position are given.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762, eq. (1); shared kv heads: Ainslie et al. 2023, arXiv:2305.13245.
    """
    check_attention("attention", q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None:
        empty_BK0P = k_BTKP.new_empty((k_BTKP.shape[0], k_BTKP.shape[2], 0, k_BTKP.shape[3]))
        return _attend_causally(q_BTHP, k_BTKP, v_BTKP), empty_BK0P, empty_BK0P.clone()
    cell_BKTP = _cells(k_BTKP, position_B)
    cache_k = cache_k_BKSP.scatter(2, cell_BKTP, k_BTKP.transpose(1, 2))
    cache_v = cache_v_BKSP.scatter(2, cell_BKTP, v_BTKP.transpose(1, 2))
    return _attend(q_BTHP, cache_k, cache_v, position_B), cache_k, cache_v


def _attend_causally(q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor) -> Tensor:
    q, k, v = q_BTHP.transpose(1, 2), k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2)
    out_BHTP = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=bool(q.shape[1] != k.shape[1]))
    return out_BHTP.transpose(1, 2)


def _attend(q_BTHP: Tensor, k_BKLP: Tensor, v_BKLP: Tensor, position_B: Tensor) -> Tensor:
    """Attend to cells 0 .. position + t."""
    (B, T, H, P), (K, L) = q_BTHP.shape, k_BKLP.shape[1:3]
    G = H // K
    last_BT = position_B.unsqueeze(1) + torch.arange(T, device=position_B.device)
    visible_BTL = torch.arange(L, device=position_B.device) <= last_BT.unsqueeze(-1)
    visible = visible_BTL[:, None, None].expand(B, 1, G, T, L).reshape(B, 1, G * T, L)
    # The query heads of one kv head become rows of one product: repeating the cache per query head would copy it.
    q = q_BTHP.transpose(1, 2).reshape(B, K, G * T, P)
    out = F.scaled_dot_product_attention(q, k_BKLP, v_BKLP, attn_mask=visible)
    return out.reshape(B, H, T, P).transpose(1, 2)


def _cells(k_BTKP: Tensor, position_B: Tensor) -> Tensor:
    B, T, K, P = k_BTKP.shape
    cell_BT = position_B.unsqueeze(1) + torch.arange(T, device=position_B.device)
    return cell_BT[:, None, :, None].expand(B, K, T, P)


def attend_in_place(
    q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, cache_k_BKSP: Tensor, cache_v_BKSP: Tensor, position_B: Tensor
) -> Tensor:
    """Attend as `attention_reference` does, with the new keys and values written into the caches given."""
    if _write_themselves(q_BTHP, cache_k_BKSP, cache_v_BKSP):
        from wm_kernels.attention.triton_op import attend_triton

        return attend_triton(q_BTHP, cache_k_BKSP, cache_v_BKSP, position_B, new=(k_BTKP, v_BTKP))
    cell_BKTP = _cells(k_BTKP, position_B)
    cache_k_BKSP.scatter_(2, cell_BKTP, k_BTKP.transpose(1, 2))
    cache_v_BKSP.scatter_(2, cell_BKTP, v_BTKP.transpose(1, 2))
    if q_BTHP.is_cuda and served(q_BTHP):
        from wm_kernels.attention.triton_op import attend_triton

        return attend_triton(q_BTHP, cache_k_BKSP, cache_v_BKSP, position_B)
    live = cache_k_BKSP.shape[2]
    if position_B.device.type == "cpu" and position_B.numel():
        # Reading a number from a CPU tensor costs nothing, and a cache is mostly unused; on a GPU it would wait for the device.
        live = min(live, int(position_B.max()) + q_BTHP.shape[1])
    return _attend(q_BTHP, cache_k_BKSP[:, :, :live], cache_v_BKSP[:, :, :live], position_B)


def _write_themselves(q_BTHP: Tensor, cache_k_BKSP: Tensor, cache_v_BKSP: Tensor) -> bool:
    """Whether Triton's kernels attend, and write the cells too: rows of caches that are not contiguous would be copied for them."""
    return q_BTHP.is_cuda and served(q_BTHP) and cache_k_BKSP.stride(-1) == cache_v_BKSP.stride(-1) == 1


def attend_without_cache(q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, valid_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_reference` does, and by torch's own attention; in `numerics` "exact" on CUDA, by the bits of calls with a cache."""
    if not (q_BTHP.is_cuda and served(q_BTHP) and exact()):
        return attention_reference(q_BTHP, k_BTKP, v_BTKP, None, None, None, valid_B)
    from wm_kernels.attention.triton_op import attend_triton

    empty_BK0P = k_BTKP.new_empty((k_BTKP.shape[0], k_BTKP.shape[2], 0, k_BTKP.shape[3]))
    return attend_triton(q_BTHP, k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2), None), empty_BK0P, empty_BK0P.clone()


def check_attention(
    op: str,
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
) -> None:
    """Raise RuntimeError, naming the op, unless the arguments of an attention call fit each other."""
    check_together(op, cache_k_BKSP=cache_k_BKSP, cache_v_BKSP=cache_v_BKSP, position_B=position_B)
    size = check_shapes(
        op,
        q_BTHP=q_BTHP,
        k_BTKP=k_BTKP,
        v_BTKP=v_BTKP,
        cache_k_BKSP=cache_k_BKSP,
        cache_v_BKSP=cache_v_BKSP,
        position_B=position_B,
        valid_B=valid_B,
    )
    check_dtype(op, q_BTHP.dtype, k_BTKP=k_BTKP, v_BTKP=v_BTKP, cache_k_BKSP=cache_k_BKSP, cache_v_BKSP=cache_v_BKSP)
    check_dtype(op, torch.int64, position_B=position_B, valid_B=valid_B)
    check_that(op, size["H"] % size["K"] == 0, lambda: f"H is {size['H']}, expected a multiple of K = {size['K']}")


@torch.library.custom_op("wm::attention", mutates_args=())
def attention(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_reference`."""
    check_attention("attention", q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    if cache_k_BKSP is None or cache_v_BKSP is None or position_B is None:
        out, cache_k, cache_v = attend_without_cache(q_BTHP, k_BTKP, v_BTKP, valid_B)
        return out.contiguous(), cache_k, cache_v
    cache_k = cache_k_BKSP.clone(memory_format=torch.contiguous_format)
    cache_v = cache_v_BKSP.clone(memory_format=torch.contiguous_format)
    return attend_in_place(q_BTHP, k_BTKP, v_BTKP, cache_k, cache_v, position_B).contiguous(), cache_k, cache_v


@attention.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention("attention", q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    B, _, K, P = k_BTKP.shape
    shape = (B, K, 0, P) if cache_k_BKSP is None else cache_k_BKSP.shape
    return q_BTHP.new_empty(q_BTHP.shape), q_BTHP.new_empty(shape), q_BTHP.new_empty(shape)


register_reference_autograd(attention, attention_reference)


@torch.library.custom_op("wm::attention_", mutates_args=("cache_k_BKSP", "cache_v_BKSP"))
def attention_(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    """`attention` that writes T cells of the given caches and copies nothing; see `attention_reference`."""
    check_attention("attention_", q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    return attend_in_place(q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B).contiguous()


@attention_.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    check_attention("attention_", q_BTHP, k_BTKP, v_BTKP, cache_k_BKSP, cache_v_BKSP, position_B, valid_B)
    return q_BTHP.new_empty(q_BTHP.shape)


register_kernel(attention, "cuda")(attention._init_fn)


@register_kernel(attention_, "cuda")
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    caches = (cache_k_BKSP, cache_v_BKSP)
    if not _write_themselves(q_BTHP, *caches):
        return attention_._init_fn(q_BTHP, k_BTKP, v_BTKP, *caches, position_B, valid_B)
    from wm_kernels.attention.triton_op import attend_triton

    def check() -> None:
        check_attention("attention_", q_BTHP, k_BTKP, v_BTKP, *caches, position_B, valid_B)

    return attend_triton(q_BTHP, *caches, position_B, new=(k_BTKP, v_BTKP), check=(check, (valid_B,)))
