"""`scored_attention` against an independent loop, in float64: all ways of scoring, ties, padding, and any split of a prefill."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import wm_kernels as wm
from wm_kernels.scored_attention import scored_attention_reference

D = torch.float64
SCORINGS = ["additive", "binary", "ratio"]


def inputs(T, seed=0, A=2, B=2, H=4, K=2, P=4, ties=True):
    """q, k, v and scores; with ties, whole scores of -1 to 3, of which binary attention sees those from 1."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn((B, T, heads, P), generator=g, dtype=D) for heads in (H, K, K))
    score = torch.randint(-1, 4, (B, T, A), generator=g).double() if ties else torch.randn((B, T, A), generator=g, dtype=D)
    return q, k, v, score


def caches(S, seed=0, A=2, B=2, K=2, P=4):
    g = torch.Generator().manual_seed(seed + 1000)
    k, v = (torch.randn((B, K, S, P), generator=g, dtype=D) for _ in "kv")
    return k, v, torch.randint(-1, 4, (B, A, S), generator=g).double()


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T", [1, 2, 7, 65])
@pytest.mark.parametrize("A", [1, 2, 4])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("run", [wm.scored_attention, scored_attention_reference])
def test_scored_attention_equals_the_loop_with_tied_scores(T, A, scoring, run):
    call = inputs(T, A=A)
    out, *empty = run(*call, None, None, None, None, None, scoring, 0.6)
    near(out, oracles.scored_attention(*call, None, None, None, scoring, 0.6)[0])
    assert [leaf.shape for leaf in empty] == [(2, 2, 0, 4), (2, 2, 0, 4), (2, A, 0)]
    cache, position = caches(T + 9, A=A), torch.tensor([9, 3])
    for valid in (None, torch.tensor([T, T // 2]), torch.tensor([0, T])):
        out, *after = run(*call, *cache, position, valid, scoring, 0.6)
        expected, live = oracles.scored_attention(*call, cache, position, valid, scoring, 0.6)
        assert out.isfinite().all()
        for b, cells in enumerate(live):
            count = T if valid is None else int(valid[b])
            near(out[b, :count], expected[b, :count])
            for leaf, heads in zip(after, cells, strict=True):
                for head, values in enumerate(heads):
                    assert torch.equal(leaf[b, head, : len(values)], torch.from_numpy(np.array(values)))


@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.29, 0.5, 0.99, 1.0])
def test_ratio_hides_fewer_keys_than_the_floor_of_its_share(ratio):
    T = 100
    q, k, v, score = inputs(T, ties=False)
    # With equal keys and no scores to speak of, the output counts the keys: every value is 1 in its own dimension.
    q, k, v = (
        torch.zeros_like(q[..., :1]).expand(2, T, 4, T),
        k[..., :1].expand(2, T, 2, T),
        torch.eye(T, dtype=D)[:, None].expand(2, T, 2, T),
    )
    out, *_ = wm.scored_attention(q, k, v, 1e-9 * score, None, None, None, None, None, "ratio", ratio)
    seen = (out > 1e-6).sum(-1)[0, :, 0].tolist()
    assert seen == [n - max(0, int(ratio * n) - 1) for n in range(1, T + 1)]


def test_ratio_that_ranks_at_most_one_key_is_additive():
    call = inputs(9)
    additive = wm.scored_attention(*call, None, None, None, None, None, "additive", 0.0)[0]
    near(wm.scored_attention(*call, None, None, None, None, None, "ratio", 0.0)[0], additive)
    near(wm.scored_attention(*call, None, None, None, None, None, "ratio", 0.2)[0], additive)


def test_additive_without_scores_is_attention():
    q, k, v, score = inputs(9)
    near(
        wm.scored_attention(q, k, v, 0 * score, None, None, None, None, None, "additive", 0.0)[0],
        wm.attention(q, k, v, None, None, None, None)[0],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, D])
@pytest.mark.parametrize("T", [1, 5])
def test_a_query_that_sees_no_key_gives_zeros_and_zero_gradients(T, dtype):
    q, k, v, score = (value.to(dtype) for value in inputs(T))
    score = (0 * score).to(D if dtype == D else torch.float32)
    score[1] = 1
    tensors = [value.clone().requires_grad_() for value in (q, k, v, score)]
    out, *_ = wm.scored_attention(*tensors, None, None, None, None, None, "binary", 0.0)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert float(out[1].detach().abs().min()) > 0
    grads = torch.autograd.grad(out.float().square().sum(), tensors[:3])
    assert all(grad.isfinite().all() and not grad[0].any() for grad in grads)
    cache = tuple(value.to(kind) for value, kind in zip(caches(9), (dtype, dtype, score.dtype), strict=True))
    cache[2].zero_()
    assert not wm.scored_attention_(q, k, v, score, *cache, torch.tensor([3, 0]), None, "binary", 0.0)[0].any()


@settings(max_examples=20, deadline=None)
@given(
    T=st.integers(2, 24),
    cuts=st.sets(st.integers(1, 23), max_size=4),
    A=st.sampled_from([1, 2, 4]),
    scoring=st.sampled_from(SCORINGS),
    seed=st.integers(0, 99),
)
def test_any_split_equals_the_whole(T, cuts, A, scoring, seed):
    call = inputs(T, seed, A)
    whole = wm.scored_attention(*call, None, None, None, None, None, scoring, 0.6)[0]
    cache, start, parts = [value.zero_() for value in caches(T + 1, A=A)], 0, []
    for end in [*sorted(cut for cut in cuts if cut < T), T]:
        piece = [value[:, start:end] for value in call]
        parts.append(wm.scored_attention_(*piece, *cache, torch.tensor([start, start]), None, scoring, 0.6))
        start = end
    near(torch.cat(parts, 1), whole)


def test_future_keys_change_nothing():
    for scoring in SCORINGS:
        call = inputs(12)
        before = wm.scored_attention(*call, None, None, None, None, None, scoring, 0.6)[0]
        for value in call:
            value[:, 8:] = 5
        near(wm.scored_attention(*call, None, None, None, None, None, scoring, 0.6)[0][:, :8], before[:, :8])


@pytest.mark.parametrize("scoring", SCORINGS)
def test_small_spans_of_queries_are_the_same(scoring, monkeypatch):
    call = (*inputs(20), *caches(30), torch.tensor([9, 0]), None, scoring, 0.6)
    whole = scored_attention_reference(*call)
    monkeypatch.setattr(sys.modules["wm_kernels.scored_attention.definition"], "MASK_ELEMENTS", 700)
    for actual, expected in zip(scored_attention_reference(*call), whole, strict=True):
        near(actual, expected)


def test_a_mask_has_at_most_the_entries_that_are_held_at_a_time(monkeypatch):
    held, attend = [], torch.nn.functional.scaled_dot_product_attention

    def measured(*tensors, attn_mask):
        held.append(attn_mask.numel())
        return attend(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", measured)
    monkeypatch.setattr(sys.modules["wm_kernels.scored_attention.definition"], "MASK_ELEMENTS", 700)
    scored_attention_reference(*inputs(20), *caches(30), torch.tensor([9, 0]), None, "additive", 0.0)
    assert len(held) > 1
    assert max(held) <= 700


def test_gradient_reaches_the_scores_only_where_they_are_added():
    for scoring in SCORINGS:
        call = [value.requires_grad_() for value in inputs(5)]
        out, *_ = wm.scored_attention(*call, None, None, None, None, None, scoring, 0.6)
        (grad,) = torch.autograd.grad(out.square().sum(), call[3:], allow_unused=True)
        assert (grad is None or not grad.any()) == (scoring == "binary")


def test_writing_past_the_cache_is_refused():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        wm.scored_attention_(*inputs(3), *caches(4), torch.tensor([0, 2]), None, "additive", 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_half_precision_keeps_float32_scores(dtype, scoring):
    q, k, v, score = inputs(9)
    call = (q.to(dtype), k.to(dtype), v.to(dtype), score.float() + 0.001)
    out, *_ = wm.scored_attention(*call, None, None, None, None, None, scoring, 0.6)
    exact, _ = oracles.scored_attention(*call, None, None, None, scoring, 0.6)
    assert out.dtype == dtype
    assert float((out.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
