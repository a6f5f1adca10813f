"""Attention over a cache of fixed capacity, with a score per key.

B batch   T tokens   H query heads   K key/value heads   G = H/K   P head dimension   A score heads   S cache capacity
L cells that are read   Q queries handled at a time   R = G*Q
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import (
    acc_dtype,
    check_dtype,
    check_shapes,
    check_that,
    check_together,
    register_kernel,
    register_reference_autograd,
    spans,
)
from wm_kernels.numerics import exact
from wm_kernels.triton_support import served

SCORINGS = ("additive", "binary", "ratio")
MASK_ELEMENTS = 2**23  # entries of one mask held at a time


def scored_attention_reference(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    cache_score_BAS: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
    rank_BTA: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the new keys, values and scores into the cache, then attend causally, by the scores too.

        cache[position + t] = (k_t, v_t, score_t)        s visible <=> s <= position + t

        additive: out_t = sum_s softmax_s(q_t · k_s / sqrt(P) + score_s) v_s,  s visible
        binary:   out_t = sum_s softmax_s(q_t · k_s / sqrt(P)) v_s,            s visible and score_s >= 1
        ratio:    as additive, without the keys of score_s < tau_t, where of the n = position + t + 1 visible keys tau_t has
                  the m-th smallest score, m = floor(ratio n); with m = 0 none is left out

    Query head h reads kv head h // (H/K) and score head h // (H/A). A query that sees no key, as in scoring "binary", gives zeros.
    Without a cache, the T tokens attend to each other.

    Args:
        q_BTHP: queries, already rotated.
        k_BTKP: keys, already rotated; same dtype.
        v_BTKP: values; same dtype.
        score_BTA: a score per key; finite; float32, or float64 for float64 q. A divides H.
        cache_k_BKSP: keys so far, or None. Cells at or past the position are undefined but must be finite.
        cache_v_BKSP: values so far, or None.
        cache_score_BAS: scores so far, dtype of score, or None.
        position_B: cells in use before the call, int64; position + T <= S. Given if and only if the caches are.
        valid_B: tokens of each row that count, int64; None is T. Outputs of later tokens are finite and without meaning, and
            their keys go to cells past the valid ones, which are undefined.
        scoring: "additive", "binary" or "ratio".
        ratio: share of the keys to rank, 0 <= ratio <= 1; ratio · n is computed in float64. Read in scoring "ratio" only.
        rank_BTA: hides keys in place of score, for an oracle that replays another runtime's choices; only without a cache.

    Returns:
        (out_BTHP, cache_k_BKSP, cache_v_BKSP) in the dtype of q and cache_score_BAS in that of score; without a cache the last
        three are empty, of S = 0. Logits and softmax are float32, or float64 for float64.

    Raises:
        RuntimeError: shapes or dtypes disagree, H is not a multiple of K and A, scoring or ratio is not one of those above, or only some
            of caches and position are given.

    Source:
        Dynamic mask attention of arXiv:2412.11834: binary as its code of 16 December 2024, additive and ratio as that of January
        2025. There a key's rank counts future keys too; here only visible ones, so that prefill and decode agree.
    """
    caches = (cache_k_BKSP, cache_v_BKSP, cache_score_BAS)
    _check("scored_attention", q_BTHP, k_BTKP, v_BTKP, score_BTA, *caches, position_B, valid_B, scoring, ratio)
    tokens = (k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2), score_BTA.transpose(1, 2))
    if cache_k_BKSP is None or cache_v_BKSP is None or cache_score_BAS is None or position_B is None:
        empty_k, empty_v, empty_score = (token.new_empty((*token.shape[:2], 0, *token.shape[3:])) for token in tokens)
        start_B = torch.zeros(q_BTHP.shape[0], dtype=torch.int64, device=q_BTHP.device)
        rank_BAT = None if rank_BTA is None else rank_BTA.transpose(1, 2)
        return _attend(q_BTHP, *tokens, start_B, scoring, ratio, rank_BAT), empty_k, empty_v, empty_score
    cell_BT = _cells(q_BTHP, position_B)
    cache_k, cache_v, cache_score = (
        cache.scatter(2, _like(cell_BT, token), token)
        for cache, token in zip((cache_k_BKSP, cache_v_BKSP, cache_score_BAS), tokens, strict=True)
    )
    return _attend(q_BTHP, cache_k, cache_v, cache_score, position_B, scoring, ratio), cache_k, cache_v, cache_score


def _cells(q_BTHP: Tensor, position_B: Tensor) -> Tensor:
    return position_B.unsqueeze(1) + torch.arange(q_BTHP.shape[1], device=position_B.device)


def _like(cell_BT: Tensor, token: Tensor) -> Tensor:
    """The cells as an index of the shape of a token's leaf, [B, heads, T] or [B, heads, T, P]."""
    cell_B1T = cell_BT.unsqueeze(1)
    return (cell_B1T if token.dim() == 3 else cell_B1T.unsqueeze(-1)).expand_as(token)


def _attend(
    q_BTHP: Tensor,
    k_BKLP: Tensor,
    v_BKLP: Tensor,
    score_BAL: Tensor,
    position_B: Tensor,
    scoring: str,
    ratio: float,
    rank_BAL: Tensor | None = None,
) -> Tensor:
    """Attend to cells 0 .. position + t of the first L = the largest position + T, or more; hidden by rank where it is given."""
    by_BAL = score_BAL if rank_BAL is None else rank_BAL
    (B, T, H, _), L = q_BTHP.shape, k_BKLP.shape[2]
    acc = acc_dtype(q_BTHP.dtype)
    k_BKLP, v_BKLP, last_BT = k_BKLP.to(acc), v_BKLP.to(acc), _cells(q_BTHP, position_B)
    ranking = _Ranking(by_BAL, ratio) if scoring == "ratio" else None
    parts = []
    for t, end in spans(T, B * H * L, MASK_ELEMENTS):
        near = L - T + end  # no query before `end` sees a later cell
        last_B1Q1 = last_BT[:, None, t:end, None]
        visible_BAQL = torch.arange(near, device=last_BT.device) <= last_B1Q1
        if scoring == "binary":
            visible_BAQL = visible_BAQL & (by_BAL[:, :, None, :near] >= 1)
        if ranking is not None:
            visible_BAQL = visible_BAQL & (by_BAL[:, :, None, :near] >= ranking.least(last_B1Q1))
        bias_BA1L = None if scoring == "binary" else score_BAL[:, :, None, :near]
        parts.append(_attend_span(q_BTHP[:, t:end].to(acc), k_BKLP[:, :, :near], v_BKLP[:, :, :near], visible_BAQL, bias_BA1L))
    return torch.cat(parts, 1).to(q_BTHP.dtype)


class _Ranking:
    """The keys of each score head in the order of their scores, sorted once for all queries."""

    def __init__(self, score_BAL: Tensor, ratio: float) -> None:
        self.score_BAL, self.cell_BAL = torch.sort(score_BAL.detach(), dim=-1)
        self.ratio = ratio

    def least(self, last_B1Q1: Tensor) -> Tensor:
        """tau [B, A, Q, 1]: the m-th smallest score among the cells up to `last`."""
        visible_BAQL = self.cell_BAL.unsqueeze(2) <= last_B1Q1
        count_BAQL = visible_BAQL.cumsum(-1, dtype=torch.int32)
        m_B1Q1 = (self.ratio * (last_B1Q1 + 1).double()).to(torch.int32)
        # For m = 0 the first of all scores, which hides nothing.
        place_BAQ1 = torch.searchsorted(count_BAQL, m_B1Q1.expand(*count_BAQL.shape[:3], 1).contiguous())
        return self.score_BAL.unsqueeze(2).expand(count_BAQL.shape).gather(-1, place_BAQ1)


def _attend_span(q_BQHP: Tensor, k_BKLP: Tensor, v_BKLP: Tensor, visible_BAQL: Tensor, bias_BA1L: Tensor | None) -> Tensor:
    (B, Q, H, P), (K, L) = q_BQHP.shape, k_BKLP.shape[1:3]
    # A query without keys attends to all of them, so that no path and no gradient meets 0/0; its output is then replaced by zeros.
    blind_BAQ1 = ~visible_BAQL.any(-1, keepdim=True)
    mask = visible_BAQL | blind_BAQ1
    if bias_BA1L is not None:
        mask = bias_BA1L.masked_fill(~mask, float("-inf"))
    A = mask.shape[1]
    mask_BKRL = mask.unsqueeze(2).expand(B, A, H // A, Q, L).reshape(B, K, H // K * Q, L)
    # The query heads of one kv head become rows of one product: repeating keys per query head would copy them.
    q_BKRP = q_BQHP.transpose(1, 2).reshape(B, K, H // K * Q, P)
    out_BKRP = F.scaled_dot_product_attention(q_BKRP, k_BKLP, v_BKLP, attn_mask=mask_BKRL)
    blind_BHQ1 = blind_BAQ1.unsqueeze(2).expand(B, A, H // A, Q, 1).reshape(B, H, Q, 1)
    return out_BKRP.reshape(B, H, Q, P).masked_fill(blind_BHQ1, 0.0).transpose(1, 2)


def _in_place(
    q_BTHP: Tensor, tokens: tuple[Tensor, ...], caches: tuple[Tensor, ...], position_B: Tensor, scoring: str, ratio: float
) -> Tensor:
    cell_BT = _cells(q_BTHP, position_B)
    for cache, token_BTX in zip(caches, tokens, strict=True):
        token = token_BTX.transpose(1, 2)
        cache.scatter_(2, _like(cell_BT, token), token)
    if q_BTHP.is_cuda and served(q_BTHP) and scoring != "ratio":
        from wm_kernels.attention.triton_op import attend_triton

        return attend_triton(q_BTHP, caches[0], caches[1], position_B, caches[2], scoring)
    if q_BTHP.is_cuda and served(q_BTHP) and exact() and q_BTHP.shape[1] > 1:
        # Scoring "ratio" has no kernel, and the bits of torch's products depend on the shape of the call.
        k, v, score = caches
        return torch.cat([_attend(q, k, v, score, position_B + t, scoring, ratio) for t, q in enumerate(q_BTHP.split(1, 1))], 1)
    live = caches[0].shape[2]
    if position_B.device.type == "cpu" and position_B.numel():
        # Reading a number from a CPU tensor costs nothing, and a cache is mostly unused; on a GPU it would wait for the device.
        live = min(live, int(position_B.max()) + q_BTHP.shape[1])
    k_BKLP, v_BKLP, score_BAL = (cache[:, :, :live] for cache in caches)
    return _attend(q_BTHP, k_BKLP, v_BKLP, score_BAL, position_B, scoring, ratio)


def _attend_to_tokens(
    q_BTHP: Tensor, k_BTKP: Tensor, v_BTKP: Tensor, score_BTA: Tensor, scoring: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The functional form without a cache, on a GPU."""
    from wm_kernels.attention.triton_op import attend_triton

    k_BKTP, v_BKTP, score_BAT = k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2), score_BTA.transpose(1, 2)
    empty_k, empty_v, empty_score = (x.new_empty((*x.shape[:2], 0, *x.shape[3:])) for x in (k_BKTP, v_BKTP, score_BAT))
    return attend_triton(q_BTHP, k_BKTP, v_BKTP, None, score_BAT, scoring), empty_k, empty_v, empty_score


def _check(
    op: str,
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    cache_score_BAS: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
) -> None:
    caches = {"cache_k_BKSP": cache_k_BKSP, "cache_v_BKSP": cache_v_BKSP, "cache_score_BAS": cache_score_BAS, "position_B": position_B}
    check_together(op, **caches)
    size = check_shapes(op, q_BTHP=q_BTHP, k_BTKP=k_BTKP, v_BTKP=v_BTKP, score_BTA=score_BTA, **caches, valid_B=valid_B)
    check_dtype(op, q_BTHP.dtype, k_BTKP=k_BTKP, v_BTKP=v_BTKP, cache_k_BKSP=cache_k_BKSP, cache_v_BKSP=cache_v_BKSP)
    check_dtype(op, acc_dtype(q_BTHP.dtype), score_BTA=score_BTA, cache_score_BAS=cache_score_BAS)
    check_dtype(op, torch.int64, position_B=position_B, valid_B=valid_B)
    for letter in "KA":
        check_that(op, size["H"] % size[letter] == 0, lambda: f"H is {size['H']}, expected a multiple of {letter} = {size[letter]}")  # noqa: B023
    check_that(op, scoring in SCORINGS, lambda: f"scoring is {scoring!r}, expected one of {', '.join(SCORINGS)}")
    check_that(op, 0 <= ratio <= 1, lambda: f"ratio is {ratio}, expected 0 to 1")


@torch.library.custom_op("wm::scored_attention", mutates_args=())
def scored_attention(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    cache_score_BAS: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `scored_attention_reference`."""
    given = (cache_k_BKSP, cache_v_BKSP, cache_score_BAS)
    _check("scored_attention", q_BTHP, k_BTKP, v_BTKP, score_BTA, *given, position_B, valid_B, scoring, ratio)
    if position_B is None and q_BTHP.is_cuda and served(q_BTHP) and scoring != "ratio":
        return _attend_to_tokens(q_BTHP, k_BTKP, v_BTKP, score_BTA, scoring)
    if position_B is None:
        none = (None,) * 4
        out_BTHP, *empty = scored_attention_reference(q_BTHP, k_BTKP, v_BTKP, score_BTA, *none, valid_B, scoring, ratio)
        return out_BTHP.contiguous(), empty[0], empty[1], empty[2]
    caches = tuple(cache.clone(memory_format=torch.contiguous_format) for cache in given if cache is not None)
    out_BTHP = _in_place(q_BTHP, (k_BTKP, v_BTKP, score_BTA), caches, position_B, scoring, ratio)
    return out_BTHP.contiguous(), caches[0], caches[1], caches[2]


@scored_attention.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor | None,
    cache_v_BKSP: Tensor | None,
    cache_score_BAS: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (cache_k_BKSP, cache_v_BKSP, cache_score_BAS)
    _check("scored_attention", q_BTHP, k_BTKP, v_BTKP, score_BTA, *given, position_B, valid_B, scoring, ratio)
    B, _, K, P = k_BTKP.shape
    S = 0 if cache_k_BKSP is None else cache_k_BKSP.shape[2]
    score = score_BTA.new_empty((B, score_BTA.shape[2], S))
    return q_BTHP.new_empty(q_BTHP.shape), k_BTKP.new_empty((B, K, S, P)), k_BTKP.new_empty((B, K, S, P)), score


register_reference_autograd(scored_attention, scored_attention_reference)


@torch.library.custom_op("wm::scored_attention_", mutates_args=("cache_k_BKSP", "cache_v_BKSP", "cache_score_BAS"))
def scored_attention_(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    cache_score_BAS: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
) -> Tensor:
    """`scored_attention` that writes T cells of the given caches and copies nothing; see `scored_attention_reference`."""
    caches = (cache_k_BKSP, cache_v_BKSP, cache_score_BAS)
    _check("scored_attention_", q_BTHP, k_BTKP, v_BTKP, score_BTA, *caches, position_B, valid_B, scoring, ratio)
    return _in_place(q_BTHP, (k_BTKP, v_BTKP, score_BTA), caches, position_B, scoring, ratio).contiguous()


@scored_attention_.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTA: Tensor,
    cache_k_BKSP: Tensor,
    cache_v_BKSP: Tensor,
    cache_score_BAS: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    scoring: str,
    ratio: float,
) -> Tensor:
    caches = (cache_k_BKSP, cache_v_BKSP, cache_score_BAS)
    _check("scored_attention_", q_BTHP, k_BTKP, v_BTKP, score_BTA, *caches, position_B, valid_B, scoring, ratio)
    return q_BTHP.new_empty(q_BTHP.shape)


register_kernel(scored_attention, "cuda")(scored_attention._init_fn)
register_kernel(scored_attention_, "cuda")(scored_attention_._init_fn)
