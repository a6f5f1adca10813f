"""How near a float64 model is to choosing otherwise, by its own scores. B rows, T tokens, K kv heads, A score heads, E experts, W window.

Experts and kept keys are chosen by comparing scores. Where two scores lie closer together than rounding moves them, two correct runs may
choose differently, and from that token on their logits have nothing to say about each other.
"""

import numpy as np
import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.feed_forwards import product_keys
from wm_graph.oracle import oracle_forward
from wm_graph.params import CdmoeParams, Params
from wm_graph.taps import Taps
from wm_graph.tolerances import UNIT_ROUNDOFF, score_budget
from wm_runtimes.choice_names import choice_names, op_of
from wm_runtimes.draws import by_token
from wm_runtimes.snapshot import Array

_REASONS = {"product_key_topk": "query_in", "router_topk": "logits_in"}  # the tap by which an op chooses; its own name where not here


def oracle_with_margins(cfg: ModelConfig, params: Params, tokens_BT: Tensor, dtype: str) -> tuple[Array, Array]:
    """The float64 logits [B, T, V], and how near the choices up to each token are to others [B, T].

    A margin is counted in budgets of `tolerances.score_budget` at `dtype`: below 1, a correct run of that dtype may choose otherwise there
    or, because states carry on what was chosen, later. `float64` scales float32's budgets by the roundoff. inf where nothing is chosen.
    """
    names = {name: _reason(name) for name in choice_names(cfg, tokens_BT.shape[1])}
    taps = Taps(only=frozenset(names.values()).__contains__)
    logits_BTV, _ = oracle_forward(cfg, params, tokens_BT, taps=taps)
    reasons = by_token({name: value.numpy() for name, value in taps.values.items()}, tuple(tokens_BT.shape))
    margin_BT = np.full(tuple(tokens_BT.shape), np.inf)
    for reason in names.values():
        margin_BT = np.minimum(margin_BT, _margin(cfg, params, reason, np.asarray(reasons[reason])) / _budget(op_of(reason), dtype))
    return logits_BTV.numpy(), np.minimum.accumulate(margin_BT, axis=1)


def _reason(name: str) -> str:
    reason = _REASONS.get(op_of(name))
    return f"{name.removesuffix('expert')}{reason}" if reason else name


def _budget(op: str, dtype: str) -> float:
    if dtype == "float64":
        return score_budget(op, "float32").relative * 2.0**-53 / UNIT_ROUNDOFF["float32"]
    return score_budget(op, dtype).relative


def _margin(cfg: ModelConfig, params: Params, name: str, reason: Array) -> Array:
    """[B, T]: the least distance of a chosen from an unchosen score, over the scale that the table of tolerances names."""
    match op_of(name):
        case "product_key_topk":
            feed_forward = params.layers[int(name.split(".")[1])].feed_forward
            assert isinstance(feed_forward, CdmoeParams)
            return _experts(reason, product_keys(cfg, feed_forward).double().numpy(), cfg.n_pick)
        case "router_topk":
            inner = name.endswith("router_topk.logits_in") and cfg.layers[int(name.split(".")[1])][0] == "inner_function_attention"
            scale = np.abs(reason).max(-1)
            return _least(_gap(reason, cfg.ifa_pick if inner else cfg.n_pick), scale)
        case "keep_window_attention":
            return _window(reason, cfg.keep_window)
        case _:
            return _threshold(reason, cfg.dma_ratio)


def _gap(score: Array, k: int) -> Array:
    """Between the k-th best and the next on the last axis; inf where there is no next."""
    if score.shape[-1] <= k:
        return np.full(score.shape[:-1], np.inf)
    ordered = -np.sort(-score, -1)
    gap: Array = ordered[..., k - 1] - ordered[..., k]
    return gap


def _least(gap_BTx: Array, scale_BTx: Array) -> Array:
    """Gaps over scales, the least of each token; 0 / 0 is a tie."""
    ratio = np.where(gap_BTx == 0, 0.0, gap_BTx / np.where(scale_BTx == 0, 1.0, scale_BTx))
    least: Array = ratio.reshape(*ratio.shape[:2], -1).min(-1)
    return least


def _experts(query_BTR2d: Array, keys_RJ2d: Array, k: int) -> Array:
    half_BTR2J = np.einsum("btrhd,rjhd->btrhj", query_BTR2d, keys_RJ2d)
    score_BTRE = (half_BTR2J[..., 0, :, None] + half_BTR2J[..., 1, None, :]).reshape(*half_BTR2J.shape[:3], -1)
    scale_BTR = (np.linalg.norm(query_BTR2d, axis=-1) * np.linalg.norm(keys_RJ2d, axis=-1).max(1)).sum(-1)
    return _least(_gap(score_BTRE, k), scale_BTR)


def _window(score_BTK: Array, window: int) -> Array:
    scale_BTK = np.maximum.accumulate(np.abs(score_BTK), 1)
    gaps = [_gap(np.moveaxis(score_BTK[:, : t + 1], 1, -1), window) for t in range(score_BTK.shape[1])]
    return _least(np.stack(gaps, 1), scale_BTK)


def _threshold(score_BTA: Array, ratio: float) -> Array:
    scale_BTA = np.maximum.accumulate(np.abs(score_BTA), 1)
    if not ratio:  # binary: seen from 1 on, by every later query
        return _least(np.minimum.accumulate(np.abs(score_BTA - 1), 1), scale_BTA)
    gaps = np.full(score_BTA.shape, np.inf)
    for t in range(score_BTA.shape[1]):
        hidden = int(np.floor(ratio * (t + 1.0))) - 1  # keys below the m-th smallest
        if hidden >= 1:
            gaps[:, t] = _gap(-np.moveaxis(score_BTA[:, : t + 1], 1, -1), hidden)
    return _least(gaps, scale_BTA)


def as_tokens(rows: list[Array]) -> Tensor:
    """Rows of unequal length as tokens [B, T], padded with 0."""
    tokens_BT = np.zeros((len(rows), max(len(row) for row in rows)), np.int64)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
    return torch.from_numpy(tokens_BT)
