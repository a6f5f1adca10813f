"""The slots of keep-window attention: which keys are kept, and attention to them.

B batch   T tokens   H query heads   K key/value heads   G = H/K   P head dimension   W window
S slots at hand   C = S + T candidates: the slots, then the new tokens   Q queries handled at a time   L candidates they may see
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, spans

MASK_ELEMENTS = 2**23  # entries of one mask held at a time


class Slots(NamedTuple):
    """Keys with their values, scores and positions; an empty slot has position -1 and score -inf."""

    k_BKSP: Tensor
    v_BKSP: Tensor
    score_BKS: Tensor
    position_BKS: Tensor

    def first(self, S: int) -> "Slots":
        """Views of the first S slots."""
        return Slots(*(leaf[:, :, :S] for leaf in self))

    def joined(self, other: "Slots") -> "Slots":
        """These slots followed by the others."""
        return Slots(*(torch.cat(pair, 2) for pair in zip(self, other, strict=True)))


def tokens_as_slots(k_BTKP: Tensor, v_BTKP: Tensor, score_BTK: Tensor, position_B: Tensor | None) -> Slots:
    """The new tokens in the layout of slots."""
    B, T, K = score_BTK.shape
    position_T = torch.arange(T, device=k_BTKP.device)
    position_BT = position_T.expand(B, T) if position_B is None else position_B.unsqueeze(1) + position_T
    return Slots(k_BTKP.transpose(1, 2), v_BTKP.transpose(1, 2), score_BTK.transpose(1, 2), position_BT.unsqueeze(1).expand(B, K, T))


def no_slots(k_BTKP: Tensor, score_BTK: Tensor) -> Slots:
    """Zero slots, as fresh tensors."""
    B, _, K, P = k_BTKP.shape
    k_BK0P, score_BK0 = k_BTKP.new_empty((B, K, 0, P)), score_BTK.new_empty((B, K, 0))
    return Slots(k_BK0P, k_BK0P.clone(), score_BK0, score_BK0.to(torch.int64))


def used_slots(position_BKS: Tensor) -> int:
    """A bound on the slots in use: past it every slot is empty. Exact on CPU; elsewhere it would wait for the device."""
    S = position_BKS.shape[2]
    if position_BKS.device.type != "cpu":
        return S
    used_S = (position_BKS >= 0).flatten(0, 1).any(0)
    return int(used_S.nonzero().max()) + 1 if bool(used_S.any()) else 0


def best_first(candidates: Slots, count_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The order of the candidates by larger score, then later position, and their positions.

    The first `count_B` candidates of each row are real (None: all); the rest are padding and rank as empty slots.

    Returns:
        (order_BKC, position_BKC): candidate indices best first, and positions with -1 for padding.
    """
    score_BKC, position_BKC = candidates.score_BKS.detach(), candidates.position_BKS
    if count_B is not None:
        padding_BC = torch.arange(score_BKC.shape[2], device=count_B.device) >= count_B.unsqueeze(1)
        padding_BKC = padding_BC.unsqueeze(1).expand_as(score_BKC)
        score_BKC = score_BKC.masked_fill(padding_BKC, float("-inf"))
        position_BKC = position_BKC.masked_fill(padding_BKC, -1)
    by_position = position_BKC.argsort(dim=-1, descending=True, stable=True)
    by_score = score_BKC.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    return by_position.gather(-1, by_score), position_BKC


def keep_best(candidates: Slots, order_BKC: Tensor, position_BKC: Tensor, W: int) -> Slots:
    """The W best candidates; empty slots hold zeros."""
    index_BKW = order_BKC[:, :, :W]
    position_BKW = position_BKC.gather(2, index_BKW)
    empty_BKW = position_BKW < 0
    index_BKWP = index_BKW.unsqueeze(-1).expand(*index_BKW.shape, candidates.k_BKSP.shape[3])
    k_BKWP, v_BKWP = (leaf.gather(2, index_BKWP).masked_fill(empty_BKW.unsqueeze(-1), 0) for leaf in candidates[:2])
    score_BKW = candidates.score_BKS.gather(2, index_BKW).masked_fill(empty_BKW, float("-inf"))
    return Slots(k_BKWP, v_BKWP, score_BKW, position_BKW)


def attend_to_best(q_BTHP: Tensor, candidates: Slots, order_BKC: Tensor | None, W: int) -> Tensor:
    """Every token attends to the W best of the slots and the tokens up to itself; without an order, to all of them."""
    (B, T, H, _), C = q_BTHP.shape, candidates.score_BKS.shape[2]
    S = C - T
    acc = acc_dtype(q_BTHP.dtype)
    k_BKCP, v_BKCP = candidates.k_BKSP.to(acc), candidates.v_BKSP.to(acc)
    ranking = None if order_BKC is None else _Ranking(order_BKC, candidates.position_BKS[:, :, :S] >= 0)
    parts = []
    for t, end in spans(T, B * H * C, MASK_ELEMENTS):
        L = S + end
        visible_BKQL = _visible(candidates.position_BKS, S, t, end)
        if ranking is not None:
            visible_BKQL = visible_BKQL & ranking.kept(S + t, L, W)
        bias_BKQL = candidates.score_BKS[:, :, None, :L].masked_fill(~visible_BKQL, float("-inf"))
        parts.append(_attend(q_BTHP[:, t:end].to(acc), k_BKCP[:, :, :L], v_BKCP[:, :, :L], bias_BKQL))
    return torch.cat(parts, 1).to(q_BTHP.dtype)


def _visible(position_BKC: Tensor, S: int, start: int, end: int) -> Tensor:
    B, K, _ = position_BKC.shape
    query_Q = torch.arange(start, end, device=position_BKC.device)
    token_QN = torch.arange(end, device=position_BKC.device) <= query_Q.unsqueeze(1)
    Q, N = token_QN.shape
    slot_BKQS = (position_BKC[:, :, None, :S] >= 0).expand(B, K, Q, S)
    return torch.cat([slot_BKQS, token_QN.expand(B, K, Q, N)], -1)


class _Ranking:
    """Counts, for every candidate, the better ones that have been seen so far: it is kept while they are fewer than W."""

    def __init__(self, order_BKC: Tensor, used_BKS: Tensor) -> None:
        C = order_BKC.shape[2]
        place_BKC = torch.arange(C, device=order_BKC.device).expand_as(order_BKC)
        self.rank_BKC = torch.empty_like(order_BKC).scatter(2, order_BKC, place_BKC)
        used_BKC = F.pad(used_BKS.to(torch.int64), [0, C - used_BKS.shape[2]]).gather(2, order_BKC)
        self.better_BKC = (used_BKC.cumsum(2) - used_BKC).gather(2, self.rank_BKC)

    def kept(self, start: int, end: int, W: int) -> Tensor:
        """Which of the first `end` candidates are kept after each of the candidates start .. end - 1 has been seen."""
        beats_BKQC = self.rank_BKC[:, :, start:end, None] < self.rank_BKC[:, :, None]
        better_BKQC = self.better_BKC.unsqueeze(2) + beats_BKQC.cumsum(2)
        self.better_BKC = better_BKQC[:, :, -1]
        return better_BKQC[..., :end] < W


def _attend(q_BQHP: Tensor, k_BKLP: Tensor, v_BKLP: Tensor, bias_BKQL: Tensor) -> Tensor:
    (B, Q, H, P), (K, L) = q_BQHP.shape, k_BKLP.shape[1:3]
    G = H // K
    # The query heads of one kv head become rows of one product: repeating keys per query head would copy them.
    q = q_BQHP.transpose(1, 2).reshape(B, K, G * Q, P)
    bias = bias_BKQL.unsqueeze(2).expand(B, K, G, Q, L).reshape(B, K, G * Q, L)
    out = F.scaled_dot_product_attention(q, k_BKLP, v_BKLP, attn_mask=bias)
    return out.view(B, H, Q, P).transpose(1, 2)


def step_(q_B1HP: Tensor, token: Slots, slots: Slots, valid_B: Tensor | None) -> Tensor:
    """One token: replace the worst slot if the token beats it, then attend to the slots, which are now exactly the W best."""
    worst_BK1 = slots.score_BKS.amin(-1, keepdim=True)
    tied_BKW = slots.position_BKS.masked_fill(slots.score_BKS != worst_BK1, torch.iinfo(torch.int64).max)
    index_BK1 = tied_BKW.argmin(-1, keepdim=True)
    later_BK1 = token.position_BKS > slots.position_BKS.gather(2, index_BK1)
    wins_BK1 = (token.score_BKS > worst_BK1) | ((token.score_BKS == worst_BK1) & later_BK1)
    if valid_B is not None:
        wins_BK1 = wins_BK1 & (valid_B > 0)[:, None, None]
    for leaf, new in zip(slots, token, strict=True):
        index, wins = (index_BK1, wins_BK1) if leaf.dim() == 3 else (index_BK1.unsqueeze(-1).expand_as(new), wins_BK1.unsqueeze(-1))
        leaf.scatter_(2, index, torch.where(wins, new, leaf.gather(2, index)))
    near = slots.first(max(1, used_slots(slots.position_BKS)))
    used_BKW = near.position_BKS >= 0
    # A padded row may have no key at all: its output has no meaning but must be finite.
    none_BK1 = ~used_BKW.any(-1, keepdim=True)
    bias_BKW = near.score_BKS.masked_fill(none_BK1, 0.0)
    acc = acc_dtype(q_B1HP.dtype)
    return _attend(q_B1HP.to(acc), near.k_BKSP.to(acc), near.v_BKSP.to(acc), bias_BKW.unsqueeze(2)).to(q_B1HP.dtype)
