"""Choices as sets: near ties pass, planted wrong choices fail. B rows, T tokens, K kv heads, R heads, k picks."""

import math

import numpy as np
import pytest

from wm_graph.errors import InputError
from wm_runtimes.selections import Judgement, Verdict, greedy_agreement, judge_experts, judge_router, judge_window, kept_keys


def experts(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys, and the best 4 of 64 experts by exhaustive search."""
    generator = np.random.default_rng(seed)
    query, keys = generator.normal(size=(2, 3, 2, 2, 8)), generator.normal(size=(2, 8, 2, 8))
    half = np.einsum("btrhd,rjhd->btrhj", query, keys)
    score = (half[..., 0, :, None] + half[..., 1, None, :]).reshape(2, 3, 2, 64)
    return query, keys, np.argsort(-score, -1)[..., :5]


def test_own_experts_in_any_order_pass() -> None:
    query, keys, best = experts()
    verdict = judge_experts(query, keys, best[..., [2, 0, 3, 1]], 0.0)
    assert (verdict.chosen, verdict.differing, verdict.excess) == (48, 0, 0.0)


def test_a_wrong_expert_with_a_big_margin_fails_and_a_near_tie_passes() -> None:
    query, keys, best = experts()
    wrong = best[..., :4].copy()
    wrong[1, 2, 0, 3] = best[1, 2, 0, 4]
    verdict = judge_experts(query, keys, wrong, 1e-6)
    assert verdict.differing == 1
    assert not verdict.passed
    assert judge_experts(query, keys, wrong, verdict.excess * 1.01e-6).passed
    assert not judge_experts(query, keys, wrong, verdict.excess * 0.99e-6).passed
    mask = np.ones((2, 3), bool)
    mask[1, 2] = False
    assert judge_experts(query, keys, wrong, 1e-6, mask).differing == 0


@pytest.mark.parametrize("value", [-1, 64, "repeat"])
def test_experts_that_cannot_be_fail_whatever_the_budget(value: int | str) -> None:
    query, keys, best = experts()
    picks = best[..., :4].copy()
    picks[0, 0, 0, 1] = picks[0, 0, 0, 0] if value == "repeat" else value
    assert judge_experts(query, keys, picks, 1e9).excess == math.inf


def test_kept_keys_equal_a_plain_search() -> None:
    score = np.random.default_rng(0).integers(0, 4, (2, 12, 3)).astype(float)  # ties abound
    kept = kept_keys(score, 5)
    for row, head, query in np.ndindex(2, 3, 12):
        ranked = sorted(range(query + 1), key=lambda key: (-score[row, key, head], -key))
        assert set(np.flatnonzero(kept[row, head, query])) == set(ranked[:5])


def test_a_wrong_key_with_a_big_margin_fails_and_a_near_tie_passes() -> None:
    score = np.array([5.0, 1.0, 4.0, 2.0, 3.0])[None, :, None]
    near, far = score.copy(), score.copy()
    far[0, 1, 0] = 3.5  # token 1, of score 1, now ranks above tokens 3 and 4
    assert judge_window(score, score, 3, 0.0).passed
    assert not judge_window(score, far, 3, 1e-3).passed
    tied = np.array([5.0, 3.0, 4.0, 2.0, 3.0 + 1e-7])[None, :, None]
    near = tied.copy()
    near[0, 1, 0] = 3.1
    verdict = judge_window(tied, near, 3, 1e-6)
    assert (verdict.differing, verdict.passed) == (1, True)
    assert not judge_window(tied, near, 3, 1e-9).passed


def test_a_window_that_holds_everything_chooses_nothing() -> None:
    score = np.random.default_rng(0).normal(size=(1, 6, 2))
    assert judge_window(score, score[:, ::-1], 6, 0.0).differing == 0


def greedy_logits(margins: list[float]) -> np.ndarray:
    logits = np.zeros((len(margins), 4))
    logits[:, 1] = margins
    return logits


def test_greedy_texts_count_up_to_the_first_step_of_small_margin() -> None:
    logits = greedy_logits([1.0, 1.0, 1e-6, 1.0])
    assert greedy_agreement([1, 1, 1, 1], [1, 1, 2, 3], logits, 1e-3) == greedy_agreement([1, 1, 1, 1], [1, 1, 1, 1], logits, 1e-3)
    assert greedy_agreement([1, 1, 1, 1], [1, 1, 2, 3], logits, 1e-3).steps == 2
    wrong = greedy_agreement([1, 1, 1, 1], [1, 2, 1, 1], logits, 1e-3)
    assert (wrong.difference, wrong.passed) == (1, False)
    short = greedy_agreement([1, 1], [1], logits, 1e-3)
    assert (short.difference, short.passed) == (1, False)
    assert not greedy_agreement([1], [1], greedy_logits([1e-6]), 1e-3).passed
    assert not greedy_agreement([1], [1], greedy_logits([math.nan]), 1e-3).passed
    with pytest.raises(InputError, match="1 steps of logits for 2 tokens"):
        greedy_agreement([1, 1], [1, 1], greedy_logits([1.0]), 1e-3)


def test_dropping_the_best_is_worse_than_dropping_the_last() -> None:
    logits = np.array([[[10.0, 5.0, 4.9999]]])
    assert judge_router(logits, np.array([[[0, 2]]]), 1e-3).passed  # a near tie
    dropped = judge_router(logits, np.array([[[1, 2]]]), 1e-3)
    assert not dropped.passed
    assert dropped.excess == pytest.approx((10 - 4.9999) / (10 * 1e-3))
    assert dropped.differing == 1


def test_an_op_that_chooses_little_is_not_lost_among_many_choices() -> None:
    verdict = Verdict({"keep_window_attention": Judgement(10**6, 10, 0.5)}) + Verdict({"router_topk": Judgement(40, 10, 0.9)})
    verdict += Verdict({"router_topk": Judgement(60, 0, 1.5)})
    assert (verdict.chosen, verdict.differing, verdict.rate, verdict.excess) == (10**6 + 100, 20, 0.1, 1.5)
    assert not verdict.passed
    assert Verdict().passed
    assert (Verdict().rate, Verdict().excess) == (0.0, 0.0)
