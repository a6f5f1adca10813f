"""Judging choices as sets: a choice may differ from the oracle's only where the oracle's margin is inside the score budget. Needs no torch.

B batch, T tokens, K kv heads, A score heads, R retrieval heads, J sub-keys, d half a query's width, E experts, k picks, W kept keys,
S keys or steps, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wm_graph.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Judgement:
    """What the oracle says about a runtime's choices.

    Attributes:
        chosen: choices made.
        differing: choices that are not the oracle's.
        excess: largest shortfall of a choice, in units of its score budget; inf for choices that cannot be (repeated, out of range).
    """

    chosen: int
    differing: int
    excess: float

    @property
    def passed(self) -> bool:
        """Every differing choice is inside the budget."""
        return self.excess <= 1.0

    @property
    def rate(self) -> float:
        """Share of choices that differ; 0 where none was made."""
        return self.differing / self.chosen if self.chosen else 0.0

    def __add__(self, other: "Judgement") -> "Judgement":
        return Judgement(self.chosen + other.chosen, self.differing + other.differing, float(np.fmax(self.excess, other.excess)))


_NOTHING = Judgement(0, 0, 0.0)


@dataclass(frozen=True)
class Verdict:
    """Judgements of all choices of a model, op by op: an op that makes few choices is not lost among those of one that makes many.

    Attributes:
        ops: op that chooses -> the judgement on its choices in all layers.
    """

    ops: Mapping[str, Judgement] = field(default_factory=dict)

    def __add__(self, other: "Verdict") -> "Verdict":
        both = {**self.ops, **other.ops}
        return Verdict({op: self.ops.get(op, _NOTHING) + other.ops.get(op, _NOTHING) for op in both})

    @property
    def chosen(self) -> int:
        """Choices made."""
        return sum(judgement.chosen for judgement in self.ops.values())

    @property
    def differing(self) -> int:
        """Choices that are not the oracle's."""
        return sum(judgement.differing for judgement in self.ops.values())

    @property
    def excess(self) -> float:
        """Largest shortfall of a choice of any op, in units of its score budget."""
        return max((judgement.excess for judgement in self.ops.values()), default=0.0)

    @property
    def rate(self) -> float:
        """Largest share of an op's choices that differ."""
        return max((judgement.rate for judgement in self.ops.values()), default=0.0)

    @property
    def passed(self) -> bool:
        """Every differing choice is inside its budget."""
        return all(judgement.passed for judgement in self.ops.values())


def judge_experts(query_BTR2d: Array, keys_RJ2d: Array, expert_BTRk: Array, budget: float, mask_BT: Array | None = None) -> Judgement:
    """Judge the picks of `product_key_topk` by the oracle's query and keys.

        shortfall = (best score that the candidate left out) - (worst score it took instead)

    A pick passes where shortfall <= budget * (|q_x| max|k_x| + |q_y| max|k_y|), and the k picks of a head are distinct experts.

    Args:
        query_BTR2d: the oracle's queries, float64.
        keys_RJ2d: the keys.
        expert_BTRk: the candidate's picks.
        budget: fraction of the scores' scale; `tolerances.score_budget`.
        mask_BT: tokens that count; None for all.
    """
    half_BTR2J, scale_BTR = _half_scores(query_BTR2d, keys_RJ2d)
    J, k = half_BTR2J.shape[-1], expert_BTRk.shape[-1]
    best_BTRk = _best_experts(half_BTR2J, k)
    possible_BTR = ((expert_BTRk >= 0) & (expert_BTRk < J * J)).all(-1) & _distinct(expert_BTRk)
    own_BTRk, made_BTRk = (_expert_scores(half_BTR2J, np.clip(pick, 0, J * J - 1)) for pick in (best_BTRk, expert_BTRk))
    shortfall_BTR, new_BTRk = _shortfall(best_BTRk, own_BTRk, expert_BTRk, made_BTRk)
    excess_BTR = np.where(possible_BTR, _in_budgets(shortfall_BTR, budget * scale_BTR), np.inf)
    counts_BT = np.ones(expert_BTRk.shape[:2], bool) if mask_BT is None else mask_BT
    return _pooled(excess_BTR[counts_BT], int(counts_BT.sum()) * expert_BTRk.shape[2] * k, int(new_BTRk[counts_BT].sum()))


def _expert_scores(half_BTR2J: Array, expert_BTRk: Array) -> Array:
    """Scores of experts: the sum of those of their halves."""
    J = half_BTR2J.shape[-1]
    x_BTRk = np.take_along_axis(half_BTR2J[..., 0, :], expert_BTRk // J, -1)
    score_BTRk: Array = x_BTRk + np.take_along_axis(half_BTR2J[..., 1, :], expert_BTRk % J, -1)
    return score_BTRk


def _shortfall(best_xk: Array, own_xk: Array, pick_xk: Array, made_xk: Array) -> tuple[Array, Array]:
    """(best score that the picks leave out - worst score taken instead, 0 where the sets are the same; which picks were taken instead)."""
    same_xkk = best_xk[..., :, None] == pick_xk[..., None, :]
    left_xk, new_xk = ~same_xkk.any(-1), ~same_xkk.any(-2)
    dropped_x, taken_x = np.where(left_xk, own_xk, -np.inf).max(-1), np.where(new_xk, made_xk, np.inf).min(-1)
    differs_x = new_xk.any(-1) & left_xk.any(-1)
    return np.subtract(dropped_x, taken_x, out=np.zeros_like(dropped_x), where=differs_x), new_xk


def judge_router(logits_BTxE: Array, expert_BTxk: Array, budget: float, mask_BT: Array | None = None) -> Judgement:
    """Judge the picks of `router_topk` by the oracle's logits.

        shortfall = (best logit that the candidate left out) - (worst logit it took instead)

    A choice passes where shortfall <= budget * max |logit|, and its k picks are distinct experts.

    Args:
        logits_BTxE: the oracle's logits, float64; x is nothing, or the choices that a token makes side by side.
        expert_BTxk: the candidate's picks.
        budget: fraction of the logits' scale; `tolerances.score_budget`.
        mask_BT: tokens that count; None for all.
    """
    E, k = logits_BTxE.shape[-1], expert_BTxk.shape[-1]
    best_BTxk = np.argsort(-logits_BTxE, axis=-1, kind="stable")[..., :k]
    possible_BTx = ((expert_BTxk >= 0) & (expert_BTxk < E)).all(-1) & _distinct(expert_BTxk)
    own_BTxk, made_BTxk = (np.take_along_axis(logits_BTxE, np.clip(pick, 0, E - 1), -1) for pick in (best_BTxk, expert_BTxk))
    shortfall_BTx, new_BTxk = _shortfall(best_BTxk, own_BTxk, expert_BTxk, made_BTxk)
    excess_BTx = np.where(possible_BTx, _in_budgets(shortfall_BTx, budget * np.abs(logits_BTxE).max(-1)), np.inf)
    counts_BT = np.ones(expert_BTxk.shape[:2], bool) if mask_BT is None else mask_BT
    return _pooled(excess_BTx[counts_BT], expert_BTxk[counts_BT].size, int(new_BTxk[counts_BT].sum()))


def judge_window(score_BTK: Array, candidate_BTK: Array, window: int, budget: float, mask_BT: Array | None = None) -> Judgement:
    """Judge the keys that `keep_window_attention` keeps when ranked by the candidate's scores, by the oracle's scores.

        shortfall = (best oracle score the candidate dropped) - (worst oracle score it kept instead), per query and kv head

    A query passes where shortfall <= budget * max |score of a visible key|.

    Args:
        score_BTK: the oracle's score of every key, in order of position.
        candidate_BTK: the candidate's.
        window: keys kept (W).
        budget: fraction of the scores' scale; `tolerances.score_budget`.
        mask_BT: queries that count (a masked query's key must be masked too, or be later than every query that counts); None for all.
    """
    own_BKTS, made_BKTS = kept_keys(score_BTK, window), kept_keys(candidate_BTK, window)
    if mask_BT is not None:
        own_BKTS, made_BKTS = (kept & mask_BT[:, None, :, None] for kept in (own_BKTS, made_BKTS))
    key_BK1S = np.moveaxis(score_BTK, -1, 1)[:, :, None, :]
    dropped_BKT = np.where(own_BKTS & ~made_BKTS, key_BK1S, -np.inf).max(-1)
    taken_BKT = np.where(made_BKTS & ~own_BKTS, key_BK1S, np.inf).min(-1)
    differs_BKT = np.isfinite(dropped_BKT)
    scale_BKT = np.maximum.accumulate(np.abs(key_BK1S[:, :, 0]), -1)
    shortfall = (dropped_BKT - taken_BKT)[differs_BKT]
    return _pooled(_in_budgets(shortfall, budget * scale_BKT[differs_BKT]), int(made_BKTS.sum()), int((made_BKTS & ~own_BKTS).sum()))


def kept_keys(score_BTK: Array, window: int) -> Array:
    """Which keys each query attends to: the W best at or before it, by larger score, then later position.

    Bool [B, K, T queries, T keys].
    """
    score_BKT = np.moveaxis(score_BTK, -1, 1)
    count = score_BKT.shape[-1]
    later = np.arange(count)
    visible_TS = later[:, None] >= later[None, :]
    if count <= window:
        return np.broadcast_to(visible_TS, (*score_BKT.shape, count))
    # A key is kept while fewer than W visible keys rank above it.
    key, other = score_BKT[..., :, None], score_BKT[..., None, :]
    above_BKSO = (other > key) | ((other == key) & (later[None, :] > later[:, None]))
    ranked_BKTS = np.cumsum(above_BKSO, -1).swapaxes(-1, -2)
    kept: Array = visible_TS & (ranked_BKTS < window)
    return kept


def judge_threshold(score_BTA: Array, candidate_BTA: Array, ratio: float | None, budget: float, mask_BT: Array | None = None) -> Judgement:
    """Judge the keys that `scored_attention` hides by the candidate's scores, in scoring "binary" or "ratio", by the oracle's scores.

        shortfall = |oracle score of a key seen by one of the two - the oracle's threshold|

    A query passes where shortfall <= budget * max |score of a visible key|.

    Args:
        score_BTA: the oracle's score of every key, in order of position.
        candidate_BTA: the candidate's.
        ratio: the share of keys that is hidden; None where the threshold is 1.
        budget: fraction of the scores' scale; `tolerances.score_budget`.
        mask_BT: queries that count, as for `judge_window`; None for all.
    """
    (own_BATS, least_BAT1), (made_BATS, _) = seen_keys(score_BTA, ratio), seen_keys(candidate_BTA, ratio)
    if mask_BT is not None:
        own_BATS, made_BATS = (seen & mask_BT[:, None, :, None] for seen in (own_BATS, made_BATS))
    differs_BATS, score_BAS = own_BATS != made_BATS, np.moveaxis(score_BTA, -1, 1)
    shortfall_BATS = np.abs(score_BAS[:, :, None, :] - least_BAT1)
    allowed_BAT1 = budget * np.maximum.accumulate(np.abs(score_BAS), -1)[..., None]
    excess = _in_budgets(shortfall_BATS, np.broadcast_to(allowed_BAT1, shortfall_BATS.shape))[differs_BATS]
    return _pooled(excess, int(made_BATS.sum()), int((made_BATS & ~own_BATS).sum() + (own_BATS & ~made_BATS).sum()))


def seen_keys(score_BTA: Array, ratio: float | None) -> tuple[Array, Array]:
    """Which keys each query sees, bool [B, A, T queries, T keys], and the least score that it sees, [B, A, T, 1].

    That is 1, or with a ratio the m-th smallest of the n keys at or before the query, m = floor(ratio n); with m = 0 every score is seen.
    """
    score_BAS = np.moveaxis(score_BTA, -1, 1)
    place = np.arange(score_BAS.shape[-1])
    visible_TS = place[:, None] >= place
    if ratio is None:
        least_BAT1 = np.ones((*score_BAS.shape, 1))
    else:
        sorted_BATS = np.sort(np.where(visible_TS, score_BAS[:, :, None, :], np.inf), -1)
        m_T1 = np.floor(ratio * (place + 1.0)).astype(np.int64)[:, None]
        index_BAT1 = np.broadcast_to(np.maximum(m_T1 - 1, 0), (*score_BAS.shape, 1))
        least_BAT1 = np.where(m_T1 > 0, np.take_along_axis(sorted_BATS, index_BAT1, -1), -np.inf)
    return visible_TS & (score_BAS[:, :, None, :] >= least_BAT1), least_BAT1


@dataclass(frozen=True)
class GreedyAgreement:
    """Two greedy continuations of one prompt, compared.

    Attributes:
        steps: steps compared: those before the first one whose oracle margin is under the budget.
        difference: first of these steps where the tokens differ, or None.
    """

    steps: int
    difference: int | None

    @property
    def passed(self) -> bool:
        """At least one step was compared and none differs."""
        return self.steps > 0 and self.difference is None


def greedy_agreement(first: Sequence[int], second: Sequence[int], oracle_SV: Array, budget: float) -> GreedyAgreement:
    """Compare two greedy texts up to the first step where the oracle itself cannot tell its two best tokens apart.

    Args:
        first: tokens of one runtime.
        second: tokens of the other.
        oracle_SV: the oracle's logits at each step, given the prompt and the tokens of `first` before that step.
        budget: a step counts where (best - second best) >= budget * max(1, rms of the logits); `tolerances.score_budget("argmax", ...)`.

    Raises:
        InputError: there are fewer logits than tokens.
    """
    longest = max(len(first), len(second))
    if len(oracle_SV) < longest:
        raise InputError(f"greedy_agreement: {len(oracle_SV)} steps of logits for {longest} tokens; give the logits of every step")
    top_S2 = np.sort(np.asarray(oracle_SV[:longest], np.float64), -1)[:, -2:]
    scale_S = np.maximum(1.0, np.sqrt(np.mean(np.square(oracle_SV[:longest]), -1)))
    unsafe = np.flatnonzero(~(top_S2[:, 1] - top_S2[:, 0] >= budget * scale_S))
    steps = int(unsafe[0]) if len(unsafe) else longest
    pairs = list(zip(first, second, strict=False))[:steps]
    differing = [step for step, (one, other) in enumerate(pairs) if one != other]
    if not differing and len(pairs) < steps:
        differing = [len(pairs)]  # one text ended where the other went on
    return GreedyAgreement(steps, differing[0] if differing else None)


def _half_scores(query_BTR2d: Array, keys_RJ2d: Array) -> tuple[Array, Array]:
    """Every sub-key's score [B, T, R, 2, J], and the experts' scale [B, T, R]."""
    query, keys = query_BTR2d.astype(np.float64), keys_RJ2d.astype(np.float64)
    half_BTR2J = np.matmul(np.moveaxis(keys, 1, 2), query[..., None])[..., 0]
    longest_R2 = np.linalg.norm(keys, axis=-1).max(1)
    return half_BTR2J, (np.linalg.norm(query, axis=-1) * longest_R2).sum(-1)


def _best_experts(half_BTR2J: Array, k: int) -> Array:
    """The k best experts, ties to the lower index."""
    best_BTR2k = np.sort(np.argsort(-half_BTR2J, axis=-1, kind="stable")[..., :k], -1)
    top_BTR2k = np.take_along_axis(half_BTR2J, best_BTR2k, -1)
    # The k best of all J² sums lie among the k² sums of the best halves; sorted halves keep the grid in order of expert index.
    grid = (top_BTR2k[..., 0, :, None] + top_BTR2k[..., 1, None, :]).reshape(*top_BTR2k.shape[:3], -1)
    expert_grid = (best_BTR2k[..., 0, :, None] * half_BTR2J.shape[-1] + best_BTR2k[..., 1, None, :]).reshape(grid.shape)
    pick_BTRk = np.argsort(-grid, axis=-1, kind="stable")[..., :k]
    best_BTRk: Array = np.take_along_axis(expert_grid, pick_BTRk, -1)
    return best_BTRk


def _distinct(index: Array) -> Array:
    """Whether the last axis holds no number twice."""
    distinct: Array = (np.diff(np.sort(index, -1), axis=-1) != 0).all(-1)
    return distinct


def _in_budgets(shortfall: Array, allowed: Array) -> Array:
    """Shortfall over budget; a shortfall of 0 is 0 whatever the budget, one that is no number is inf."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(shortfall <= 0, 0.0, shortfall / allowed)
    return np.where(np.isnan(ratio), np.inf, ratio)


def _pooled(excess: Array, chosen: int, differing: int) -> Judgement:
    return Judgement(chosen, differing, float(excess.max(initial=0.0)))
