"""Keep-window attention.

B batch   T tokens   H query heads   K key/value heads   P head dimension   W slots, or window
"""

import torch
from torch import Tensor

from wm_kernels._registration import (
    acc_dtype,
    check_dtype,
    check_shapes,
    check_that,
    check_together,
    register_kernel,
    register_reference_autograd,
)
from wm_kernels.keep_window_attention.slots import (
    Slots,
    attend_to_best,
    best_first,
    keep_best,
    no_slots,
    step_,
    tokens_as_slots,
    used_slots,
)
from wm_kernels.triton_support import served


def keep_window_attention_reference(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
    rank_BTK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend to the W best-scored keys at or before each token, and keep those of the last token.

        out_t = sum_s softmax_s(q_t · k_s / sqrt(P) + score_s) v_s,  s in best_W(keys at or before t)

    Keys are ranked by larger score, then later position, per kv head; query head h reads kv head h // (H/K). A key that leaves the
    W best never returns, so the slots are the whole state. A token may rank below the W best itself.

    Args:
        q_BTHP: queries, already rotated.
        k_BTKP: keys, already rotated; same dtype.
        v_BTKP: values; same dtype.
        score_BTK: rank of each key and the value added to its logits; finite; float32, or float64 for float64 q.
        slot_k_BKWP: kept keys in any order, or None.
        slot_v_BKWP: their values, or None.
        slot_score_BKW: their scores, dtype of score, or None; -inf marks an empty slot.
        slot_position_BKW: their positions, int64, or None; -1 marks an empty slot.
        position_B: tokens seen before the call, int64. Given if and only if the slots are.
        valid_B: tokens of each row that count, int64; None is T. Later tokens leave the slots unchanged and their outputs are
            finite and without meaning.
        window: W when no slots are given; otherwise the number of slots is W and this is not read.
        rank_BTK: ranks the keys in place of score, for an oracle that replays another runtime's choices; only without slots.

    Returns:
        (out_BTHP, slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW); slots in no particular order, empty ones zero.
        Without slots the last four are empty tensors, of W = 0. Logits and softmax are float32, or float64 for float64.

    Raises:
        RuntimeError: shapes or dtypes disagree, H is not a multiple of K, window < 1, or only some of slots and position are given.

    Source:
        Trainable dynamic mask attention, arXiv:2508.02124; order of ties: docs/design.md.
    """
    _check(
        "keep_window_attention", q_BTHP, k_BTKP, v_BTKP, score_BTK, slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW, position_B,
        valid_B, window
    )  # fmt: skip
    if slot_k_BKWP is None or slot_v_BKWP is None or slot_score_BKW is None or slot_position_BKW is None:
        tokens = tokens_as_slots(k_BTKP, v_BTKP, score_BTK, None)
        ranked = tokens if rank_BTK is None else tokens._replace(score_BKS=rank_BTK.transpose(1, 2))
        order_BKT = best_first(ranked, None)[0] if q_BTHP.shape[1] > window else None
        return attend_to_best(q_BTHP, tokens, order_BKT, window), *no_slots(k_BTKP, score_BTK)
    tokens = tokens_as_slots(k_BTKP, v_BTKP, score_BTK, position_B)
    slots = Slots(slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    out_BTHP, slots = _advance(q_BTHP, tokens, slots, valid_B, slot_k_BKWP.shape[2])
    return out_BTHP, *slots


def _advance(q_BTHP: Tensor, tokens: Slots, slots: Slots, valid_B: Tensor | None, W: int) -> tuple[Tensor, Slots]:
    """Outputs, and the best W (or all, if fewer) of slots and valid tokens."""
    S, T = slots.score_BKS.shape[2], q_BTHP.shape[1]
    candidates = slots.joined(tokens)
    order_BKC, position_BKC = best_first(candidates, None if valid_B is None else valid_B + S)
    out_BTHP = attend_to_best(q_BTHP, candidates, order_BKC if S + T > W else None, W)
    return out_BTHP, keep_best(candidates, order_BKC, position_BKC, W)


def _in_place(q_BTHP: Tensor, tokens: Slots, slots: Slots, valid_B: Tensor | None) -> Tensor:
    if q_BTHP.shape[1] == 1:
        return step_(q_BTHP, tokens, slots, valid_B)
    out_BTHP, kept = _advance(q_BTHP, tokens, slots.first(used_slots(slots.position_BKS)), valid_B, slots.score_BKS.shape[2])
    for leaf, new in zip(slots, kept, strict=True):
        leaf[:, :, : new.shape[2]].copy_(new)
    return out_BTHP


def _check(
    op: str,
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
) -> None:
    slots = {
        "slot_k_BKWP": slot_k_BKWP,
        "slot_v_BKWP": slot_v_BKWP,
        "slot_score_BKW": slot_score_BKW,
        "slot_position_BKW": slot_position_BKW,
        "position_B": position_B,
    }
    check_together(op, **slots)
    size = check_shapes(op, q_BTHP=q_BTHP, k_BTKP=k_BTKP, v_BTKP=v_BTKP, score_BTK=score_BTK, **slots, valid_B=valid_B)
    check_dtype(op, q_BTHP.dtype, k_BTKP=k_BTKP, v_BTKP=v_BTKP, slot_k_BKWP=slot_k_BKWP, slot_v_BKWP=slot_v_BKWP)
    check_dtype(op, acc_dtype(q_BTHP.dtype), score_BTK=score_BTK, slot_score_BKW=slot_score_BKW)
    check_dtype(op, torch.int64, slot_position_BKW=slot_position_BKW, position_B=position_B, valid_B=valid_B)
    check_that(op, size["H"] % size["K"] == 0, lambda: f"H is {size['H']}, expected a multiple of K = {size['K']}")
    check_that(op, window >= 1, lambda: f"window is {window}, expected at least 1")


@torch.library.custom_op("wm::keep_window_attention", mutates_args=())
def keep_window_attention(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `keep_window_attention_reference`."""
    given = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    _check("keep_window_attention", q_BTHP, k_BTKP, v_BTKP, score_BTK, *given, position_B, valid_B, window)
    return _functional(q_BTHP, k_BTKP, v_BTKP, score_BTK, *given, position_B, valid_B, window)


def _functional(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    if slot_k_BKWP is None:
        out_BTHP, *empty = keep_window_attention_reference(q_BTHP, k_BTKP, v_BTKP, score_BTK, None, None, None, None, None, valid_B, window)
        return out_BTHP.contiguous(), empty[0], empty[1], empty[2], empty[3]
    slots = Slots(*(leaf.clone(memory_format=torch.contiguous_format) for leaf in given if leaf is not None))
    out_BTHP = _in_place(q_BTHP, tokens_as_slots(k_BTKP, v_BTKP, score_BTK, position_B), slots, valid_B)
    return out_BTHP.contiguous(), *slots


@keep_window_attention.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    _check("keep_window_attention", q_BTHP, k_BTKP, v_BTKP, score_BTK, *given, position_B, valid_B, window)
    B, _, K, P = k_BTKP.shape
    W = 0 if slot_k_BKWP is None else slot_k_BKWP.shape[2]
    k, score = (B, K, W, P), (B, K, W)
    slots = k_BTKP.new_empty(k), k_BTKP.new_empty(k), score_BTK.new_empty(score), score_BTK.new_empty(score, dtype=torch.int64)
    return q_BTHP.new_empty(q_BTHP.shape), *slots


@register_kernel(keep_window_attention, "cuda")
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor | None,
    slot_v_BKWP: Tensor | None,
    slot_score_BKW: Tensor | None,
    slot_position_BKW: Tensor | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)

    def check() -> None:
        _check("keep_window_attention", q_BTHP, k_BTKP, v_BTKP, score_BTK, *given, position_B, valid_B, window)

    if not _has_kernels(q_BTHP, slot_k_BKWP):
        check()
        return _functional(q_BTHP, k_BTKP, v_BTKP, score_BTK, *given, position_B, valid_B, window)
    from wm_kernels.keep_window_attention.triton_op import keep_window_attention_triton

    tensors = (q_BTHP, k_BTKP, v_BTKP, score_BTK)
    if slot_k_BKWP is None or slot_v_BKWP is None or slot_score_BKW is None or slot_position_BKW is None:
        check()
        out_BTHP, _ = keep_window_attention_triton(*tensors, None, None, valid_B, window)
        return out_BTHP, *no_slots(k_BTKP, score_BTK)
    slots = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    out_BTHP, new = keep_window_attention_triton(*tensors, slots, position_B, valid_B, window, check=check)
    return out_BTHP, *(new or slots)


def _has_kernels(q_BTHP: Tensor, slot_k_BKWP: Tensor | None) -> bool:
    return served(q_BTHP) and (slot_k_BKWP is None or slot_k_BKWP.shape[2] > 0)


register_reference_autograd(keep_window_attention, keep_window_attention_reference)


@torch.library.custom_op("wm::keep_window_attention_", mutates_args=("slot_k_BKWP", "slot_v_BKWP", "slot_score_BKW", "slot_position_BKW"))
def keep_window_attention_(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor,
    slot_v_BKWP: Tensor,
    slot_score_BKW: Tensor,
    slot_position_BKW: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    window: int,
) -> Tensor:
    """`keep_window_attention` that updates the given slots, for T = 1 one slot of each head; see `keep_window_attention_reference`."""
    slots = Slots(slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    _check("keep_window_attention_", q_BTHP, k_BTKP, v_BTKP, score_BTK, *slots, position_B, valid_B, window)
    return _in_place(q_BTHP, tokens_as_slots(k_BTKP, v_BTKP, score_BTK, position_B), slots, valid_B).contiguous()


@register_kernel(keep_window_attention_, "cuda")
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor,
    slot_v_BKWP: Tensor,
    slot_score_BKW: Tensor,
    slot_position_BKW: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    window: int,
) -> Tensor:
    slots = Slots(slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)

    def check() -> None:
        _check("keep_window_attention_", q_BTHP, k_BTKP, v_BTKP, score_BTK, *slots, position_B, valid_B, window)

    if not _has_kernels(q_BTHP, slot_k_BKWP):
        check()
        return _in_place(q_BTHP, tokens_as_slots(k_BTKP, v_BTKP, score_BTK, position_B), slots, valid_B).contiguous()
    from wm_kernels.keep_window_attention.triton_op import keep_window_attention_triton

    return keep_window_attention_triton(q_BTHP, k_BTKP, v_BTKP, score_BTK, slots, position_B, valid_B, window, True, check)[0]


@keep_window_attention_.register_fake
def _(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slot_k_BKWP: Tensor,
    slot_v_BKWP: Tensor,
    slot_score_BKW: Tensor,
    slot_position_BKW: Tensor,
    position_B: Tensor,
    valid_B: Tensor | None,
    window: int,
) -> Tensor:
    slots = (slot_k_BKWP, slot_v_BKWP, slot_score_BKW, slot_position_BKW)
    _check("keep_window_attention_", q_BTHP, k_BTKP, v_BTKP, score_BTK, *slots, position_B, valid_B, window)
    return q_BTHP.new_empty(q_BTHP.shape)
