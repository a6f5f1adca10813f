"""Every op against an independent oracle, in float64 unless the test says otherwise."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import wm_kernels as wm
from wm_kernels.keep_window_attention import keep_window_attention_reference
from wm_kernels.keep_window_attention.slots import used_slots
from wm_kernels.product_key_topk.definition import ordered_topk

LENGTHS = [1, 2, 63, 64, 65, 130]


def near(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near_where_valid(actual, expected, valid):
    assert actual.isfinite().all()
    for b in range(len(actual)):
        count = actual.shape[1] if valid is None else int(valid[b])
        near(actual[b, :count], expected[b, :count])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def scan_inputs(T, seed=0, B=2, H=4, G=2, P=3, N=6, F=2):
    g = generator(seed)
    x, b, c = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((B, T, H, P), (B, T, G, N), (B, T, G, N)))
    dt = torch.rand((B, T, H), generator=g, dtype=torch.float64)
    A = -3 * torch.rand((H,), generator=g, dtype=torch.float64) - 0.01
    state = torch.randn((B, H, N, P), generator=g, dtype=torch.float64)
    cos, sin = wm.rope_angles(torch.arange(5, 5 + T).repeat(B, 1), F, 100.0, True)
    return x, dt, A, b, c, cos, sin, state


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("initial", [False, True])
def test_ssd_scan_equals_the_recurrence(T, initial):
    x, dt, A, b, c, cos, sin, state = scan_inputs(T)
    state = state if initial else None
    for valid in (None, torch.tensor([T, T // 2]), torch.tensor([0, T - 1])):
        y, final = wm.ssd_scan(x, dt, A, b, c, state, valid)
        expected_y, expected_final = oracles.ssd_scan(x, dt, A, b, c, state, valid)
        near_where_valid(y, expected_y, valid)
        near(final, expected_final)
    y, final = wm.ssd_scan_rope(x, dt, A, b, c, cos, sin, state, valid)
    expected_y, expected_final = oracles.ssd_scan(x, dt, A, b, c, state, valid, cos, sin)
    near_where_valid(y, expected_y, valid)
    near(final, expected_final)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_ssd_scan_heads_read_consecutive_groups(G):
    x, dt, A, b, c, _, _, state = scan_inputs(67, G=G)
    for actual, expected in zip(wm.ssd_scan(x, dt, A, b, c, state, None), oracles.ssd_scan(x, dt, A, b, c, state, None), strict=True):
        near(actual, expected)


def test_ssd_scan_of_an_empty_row_returns_its_state_bit_for_bit():
    for T in (1, 70):
        x, dt, A, b, c, _, _, state = scan_inputs(T)
        _, final = wm.ssd_scan(x, dt, A, b, c, state, torch.tensor([0, T]))
        assert torch.equal(final[0], state[0])


def test_ssd_scan_survives_decay_that_forgets_everything():
    x, dt, A, b, c, _, _, state = scan_inputs(130)
    dt[:, 60:70] = 1e4
    y, final = wm.ssd_scan(x.float(), dt.float(), A.float(), b.float(), c.float(), state.float(), None)
    expected_y, expected_final = oracles.ssd_scan(*(v.float() for v in (x, dt, A, b, c, state)), None)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-4, atol=1e-4 * float(expected_y.abs().max()))
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(T=st.integers(2, 90), cut=st.integers(1, 89), seed=st.integers(0, 99))
def test_ssd_scan_of_two_parts_equals_the_whole(T, cut, seed):
    cut = min(cut, T - 1)
    x, dt, A, b, c, cos, sin, state = scan_inputs(T, seed)
    whole = wm.ssd_scan_rope(x, dt, A, b, c, cos, sin, state, None)
    y0, middle = wm.ssd_scan_rope(*(v[:, :cut] for v in (x, dt)), A, *(v[:, :cut] for v in (b, c, cos, sin)), state, None)
    y1, final = wm.ssd_scan_rope(*(v[:, cut:] for v in (x, dt)), A, *(v[:, cut:] for v in (b, c, cos, sin)), middle, None)
    near(torch.cat([y0, y1], 1), whole[0])
    near(final, whole[1])


def qkv(T, seed=0, B=2, H=4, K=2, P=4):
    g = generator(seed)
    return tuple(torch.randn((B, T, heads, P), generator=g, dtype=torch.float64) for heads in (H, K, K))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_attention_equals_the_loop(T, K):
    q, k, v = qkv(T, K=K)
    out, empty_k, empty_v = wm.attention(q, k, v, None, None, None, None)
    near(out, oracles.attention(q, k, v, None, None, None, None)[0])
    assert empty_k.shape == empty_v.shape == (2, K, 0, 4)
    cache_k, cache_v = torch.randn(2, 2, K, T + 9, 4, dtype=torch.float64)
    position = torch.tensor([9, 3])
    for valid in (None, torch.tensor([T, T // 2])):
        out, new_k, new_v = wm.attention(q, k, v, cache_k, cache_v, position, valid)
        expected, live = oracles.attention(q, k, v, cache_k, cache_v, position, valid)
        near_where_valid(out, expected, valid)
        for (b, g), (keys, values) in live.items():
            near(new_k[b, g, : len(keys)], torch.from_numpy(np.array(keys)))
            near(new_v[b, g, : len(values)], torch.from_numpy(np.array(values)))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_attention_rope_equals_the_loop_over_rotated_heads(T, K):
    q, k, v = qkv(T, K=K)
    cache_k, cache_v = torch.randn(2, 2, K, T + 9, 4, dtype=torch.float64)
    position, valid = torch.tensor([9, 3]), torch.tensor([T, T // 2])
    angle = (position[:, None] + torch.arange(T))[..., None].double() * 0.7
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(2)

    def rotated(x):  # the first pair alone: entries 0 and 1 as one complex number
        return torch.cat([torch.view_as_real(torch.complex(x[..., :1], x[..., 1:2]) * turn).squeeze(-2), x[..., 2:]], -1)

    packed = torch.cat([q, k, v], 2).flatten(2)
    for cache in ((None, None, None, None), (cache_k, cache_v, position, valid)):
        out, new_k, new_v = wm.attention_rope(packed, angle.cos(), angle.sin(), *cache, 4, K, 4)
        expected, live = oracles.attention(rotated(q), rotated(k), v, *cache)
        near_where_valid(out.unflatten(2, (4, 4)), expected, cache[3])
        for (b, g), (keys, values) in live.items():
            if cache[0] is not None:
                near(new_k[b, g, : len(keys)], torch.from_numpy(np.array(keys)))
                near(new_v[b, g, : len(values)], torch.from_numpy(np.array(values)))


def test_attention_refuses_to_write_past_the_cache():
    q, k, v = qkv(3)
    cache = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        wm.attention_(q, k, v, cache, cache.clone(), torch.tensor([0, 2]), None)


def empty_slots(W, B=2, K=2, P=4):
    k = torch.zeros((B, K, W, P), dtype=torch.float64)
    score = torch.full((B, K, W), -torch.inf, dtype=torch.float64)
    return k, k.clone(), score, torch.full((B, K, W), -1)


def tied_score(T, seed=0, B=2, K=2):
    return torch.randint(0, 4, (B, T, K), generator=generator(seed)).double()


def agree_as_sets(slots, kept):
    for (b, g), records in kept.items():
        k, v, score, position = (leaf[b, g] for leaf in slots)
        order = position.argsort()[len(position) - len(records) :]
        assert int((position >= 0).sum()) == len(records)
        assert position[order].tolist() == [record[0] for record in records]
        assert score[order].tolist() == [record[1] for record in records]
        for w, record in zip(order, records, strict=True):
            near(k[w], torch.from_numpy(record[2]))
            near(v[w], torch.from_numpy(record[3]))
        assert (score[position < 0] == -torch.inf).all()


@pytest.mark.parametrize("T", [1, 2, 20, 65])
@pytest.mark.parametrize("W", [1, 3, "T", "more"])
@pytest.mark.parametrize("run", [wm.keep_window_attention, keep_window_attention_reference])
def test_keep_window_attention_equals_the_loop_with_tied_scores(T, W, run):
    W = {"T": T, "more": T + 7}.get(W, W)
    q, k, v = qkv(T)
    score = tied_score(T)
    out, *none = run(q, k, v, score, None, None, None, None, None, None, W)
    near(out, oracles.keep_window_attention(q, k, v, score, None, None, None, W)[0])
    assert [leaf.numel() for leaf in none] == [0, 0, 0, 0]
    slots, position = empty_slots(W), torch.zeros(2, dtype=torch.int64)
    for start, valid in enumerate((torch.tensor([T, 0]), None, torch.tensor([T // 2, T]))):
        q, k, v = qkv(T, seed=start)
        score = tied_score(T, seed=start)
        expected, kept = oracles.keep_window_attention(q, k, v, score, slots, position, valid, W)
        out, *slots = run(q, k, v, score, *slots, position, valid, W)
        near_where_valid(out, expected, valid)
        agree_as_sets(slots, kept)
        position = position + (T if valid is None else valid)


def test_keep_window_attention_ignores_the_order_of_the_slots():
    q, k, v = qkv(6)
    _, *slots = wm.keep_window_attention(q, k, v, tied_score(6), *empty_slots(9), torch.tensor([0, 0]), torch.tensor([6, 4]), 9)
    order = torch.randperm(9, generator=generator(1))
    mixed = [leaf[:, :, order] for leaf in slots]
    for T in (1, 5):
        q, k, v = qkv(T, seed=T)
        arguments = (torch.tensor([6, 4]), None, 9)
        plain = wm.keep_window_attention(q, k, v, tied_score(T), *slots, *arguments)
        shuffled = wm.keep_window_attention(q, k, v, tied_score(T), *mixed, *arguments)
        near(shuffled[0], plain[0])
        assert torch.equal(shuffled[4].sort(-1).values, plain[4].sort(-1).values)


def test_keep_window_attention_in_small_query_chunks_is_the_same(monkeypatch):
    q, k, v = qkv(20)
    call = (q, k, v, tied_score(20), *empty_slots(5), torch.tensor([0, 0]), None, 5)
    whole = keep_window_attention_reference(*call)
    monkeypatch.setattr(sys.modules["wm_kernels.keep_window_attention.slots"], "MASK_ELEMENTS", 600)
    for actual, expected in zip(keep_window_attention_reference(*call), whole, strict=True):
        near(actual, expected)


@pytest.mark.parametrize(("last", "used"), [([-1, -1], 0), ([0, -1], 1), ([-1, 3], 4), ([2, 7], 8)])
def test_used_slots_are_those_up_to_the_last_in_use_of_any_row(last, used):
    position_BKS = torch.full((2, 2, 8), -1)
    for b, slot in enumerate(last):
        if slot >= 0:
            position_BKS[b, 1, slot] = 0  # the first token of all is in use too
    assert used_slots(position_BKS) == used


@settings(max_examples=15, deadline=None)
@given(T=st.integers(2, 24), cut=st.integers(1, 23), W=st.integers(1, 12), seed=st.integers(0, 99))
def test_keep_window_attention_of_two_parts_equals_the_whole(T, cut, W, seed):
    cut = min(cut, T - 1)
    q, k, v = qkv(T, seed)
    score, start = tied_score(T, seed), torch.tensor([0, 0])
    whole = wm.keep_window_attention(q, k, v, score, *empty_slots(W), start, None, W)
    first, *slots = wm.keep_window_attention(*(a[:, :cut] for a in (q, k, v, score)), *empty_slots(W), start, None, W)
    second, *slots = wm.keep_window_attention(*(a[:, cut:] for a in (q, k, v, score)), *slots, start + cut, None, W)
    near(torch.cat([first, second], 1), whole[0])
    assert torch.equal(slots[3].sort(-1).values, whole[4].sort(-1).values)


def test_ordered_topk_gives_ties_to_the_lower_index():
    value, index = ordered_topk(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 4)
    assert index.tolist() == [1, 2, 4, 0]
    assert value.tolist() == [3, 3, 3, 1]


@settings(max_examples=15, deadline=None)
@given(J=st.integers(1, 9), k=st.integers(1, 9), tied=st.booleans(), seed=st.integers(0, 99))
def test_product_key_topk_equals_exhaustive_search(J, k, tied, seed):
    g, k = generator(seed), min(k, J)
    shape = [(2, 3, 2, 2, 4), (2, J, 2, 4)]
    query, keys = (
        torch.randint(-1, 2, s, generator=g).double() if tied else torch.randn(s, generator=g, dtype=torch.float64) for s in shape
    )
    weight, expert = wm.product_key_topk(query, keys, k)
    expected_weight, expected_expert = oracles.product_key_topk(query, keys, k)
    assert torch.equal(expert, expected_expert)
    near(weight, expected_weight)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("weight_inside", [False, True])
def test_expert_mix_equals_the_sum_over_experts(activation, weight_inside, monkeypatch):
    g = generator(0)
    x, weight = torch.randn((2, 5, 6), generator=g, dtype=torch.float64), torch.rand((2, 5, 2, 3), generator=g, dtype=torch.float64)
    down, up = torch.randn((2, 9, 6), generator=g, dtype=torch.float64)
    expert = torch.randint(0, 9, (2, 5, 2, 3), generator=g)
    call = (x, expert, weight, down, up, activation, weight_inside)
    expected = oracles.expert_mix(*call)
    near(wm.expert_mix(*call), expected)
    for elements in (100, 36 * 9):  # two tokens at a time, and nine of ten
        monkeypatch.setattr(sys.modules["wm_kernels.expert_mix.definition"], "GATHERED_ELEMENTS", elements)
        near(wm.expert_mix(*call), expected)


def test_expert_mix_refuses_an_unknown_activation():
    x = torch.zeros(1, 1, 2)
    with pytest.raises(RuntimeError, match="wm::expert_mix: activation is 'relu', expected one of silu, gelu"):
        wm.expert_mix(x, torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 1), x[0], x[0], "relu", False)


def test_rope_angles_are_exact_to_position_two_to_the_24():
    position = torch.tensor([[0, 1, 2**12 + 1, 2**24 - 1, 2**24]])
    for actual, expected in zip(wm.rope_angles(position, 8, 10000.0, True), oracles.rope_angles(position, 8, 10000.0), strict=True):
        near(actual, expected, 1e-8)
    for actual, expected in zip(wm.rope_angles(position, 8, 10000.0), oracles.rope_angles(position, 8, 10000.0), strict=True):
        assert actual.dtype == torch.float32
        near(actual.double(), expected, 1e-7)


@pytest.mark.parametrize("P", [4, 5, 8])
def test_rope_turns_each_pair_as_a_complex_number(P):
    x = torch.randn((2, 3, 2, P), generator=generator(0), dtype=torch.float64)
    cos, sin = wm.rope_angles(torch.tensor([[0, 1, 7], [100, 5, 3]]), 2, 10000.0, True)
    near(wm.rope(x, cos, sin), oracles.rope(x, cos, sin))


@pytest.mark.parametrize("scaled", [False, True])
def test_residual_rms_norm_equals_the_formula(scaled):
    x, residual = torch.randn((2, 5, 8), generator=generator(0), dtype=torch.float64)
    scale, weight = torch.rand((2, 8), generator=generator(1), dtype=torch.float64)
    call = (x, residual, scale if scaled else None, weight, 1e-6)
    for actual, expected in zip(wm.residual_rms_norm(*call), oracles.residual_rms_norm(*call), strict=True):
        near(actual, expected)


def test_residual_rms_norm_casts_before_the_weight():
    x, residual = torch.randn((2, 5, 64), generator=generator(0)).half()
    weight = torch.rand(64, generator=generator(1)).half()
    normed, total = wm.residual_rms_norm(x, residual, None, weight, 1e-6)
    assert torch.equal(total, (x.float() + residual.float()).half())
    wide = total.float()
    assert torch.equal(normed, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_their_dtype_and_float32_states(dtype):
    x, dt, A, b, c, cos, sin, _ = (v.float() for v in scan_inputs(5))
    y, state = wm.ssd_scan_rope(x.to(dtype), dt, A, b.to(dtype), c.to(dtype), cos, sin, None, None)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact, _ = oracles.ssd_scan(x.to(dtype), dt, A, b.to(dtype), c.to(dtype), None, None, cos, sin)
    assert float((y.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    q, k, v = (value.to(dtype) for value in qkv(5))
    score = tied_score(5).float()
    out, *_ = wm.keep_window_attention(q, k, v, score, None, None, None, None, None, None, 3)
    exact, _ = oracles.keep_window_attention(q, k, v, score, None, None, None, 3)
    assert out.dtype == dtype
    assert float((out.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
