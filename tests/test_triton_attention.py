"""The Triton kernels of keep-window, scored and cached attention against the float64 reference.

B rows, T tokens, H query heads, K kv heads, A score heads, P head dimension, W window, S cells.
"""

import json
from importlib.resources import files

import pytest
import torch

from triton_support import DEVICE, DTYPES, ON_CUDA, check, needs_triton, random, scattered, wide
from wm_kernels import numerics
from wm_kernels.attention.definition import attention_reference
from wm_kernels.attention_rope.definition import attention_rope_reference
from wm_kernels.keep_window_attention.definition import keep_window_attention_reference
from wm_kernels.scored_attention.definition import scored_attention_reference

pytestmark = needs_triton

OP = "keep_window_attention"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coarse(score):
    """Scores of which many are equal, zeros of both signs among them."""
    return (score * 2).round() / 2


def tokens(g, B, T, H, K, P, dtype=torch.float32, ties=False):
    q, k, v = (random(g, B, T, heads, P, dtype=dtype) for heads in (H, K, K))
    score = random(g, B, T, K)
    return q, k, v, coarse(score) if ties else score


def slots(g, B, K, W, P, used, dtype=torch.float32, ties=False, before=60):
    """Slots of which `used` hold keys of positions below `before`, in no order, and that position."""
    k, v, score = random(g, B, K, W, P, dtype=dtype), random(g, B, K, W, P, dtype=dtype), random(g, B, K, W)
    position = torch.rand(B, K, max(W, before), generator=g).argsort(-1)[:, :, :W].to(DEVICE)
    empty = torch.rand(B, K, W, generator=g).argsort(-1).to(DEVICE) >= used
    k[empty], v[empty], position[empty] = 0, 0, -1
    score = (coarse(score) if ties else score).masked_fill(empty, float("-inf"))
    return (k, v, score, position), torch.full((B,), max(W, before), device=DEVICE)


def by_position(leaves):
    order = leaves[3].argsort(dim=-1, stable=True)
    k, v = (leaf.gather(2, order.unsqueeze(-1).expand_as(leaf)) for leaf in leaves[:2])
    return k, v, leaves[2].gather(2, order), leaves[3].gather(2, order)


def assert_same_slots(actual, expected):
    """The same keys, bit for bit, in any order."""
    for a, e in zip(by_position(actual), by_position(expected), strict=True):
        assert torch.equal(a.to(e.dtype), e)


def keep(*args, **kwargs):
    from wm_kernels.keep_window_attention.triton_op import keep_window_attention_triton

    return keep_window_attention_triton(*args, **kwargs)


def exactly(call, *args, **kwargs):
    with numerics("exact"):
        return call(*args, **kwargs)


def compare(dtype, call, state, position, valid, W):
    """Functional, on a GPU twice, and in place, against the reference; tokens that do not count give finite outputs."""
    given = state or (None,) * 4
    expected = keep_window_attention_reference(*wide(call), *wide(given), position, valid, W)
    out, after = keep(*call, state, position, valid, W)
    if ON_CUDA:
        again, after_again = keep(*call, state, position, valid, W)
        assert torch.equal(out, again)
        assert state is None or all(torch.equal(a, b) for a, b in zip(after, after_again, strict=True))
    T = out.shape[1]
    counts = torch.arange(T, device=DEVICE) < (torch.full_like(call[0][:, :1, 0, 0], T) if valid is None else valid.unsqueeze(1))
    assert out.isfinite().all()
    check(OP, dtype, out[counts], expected[0][counts])
    if state is None:
        return
    assert_same_slots(after, expected[1:])
    leaves = tuple(leaf.clone() for leaf in state)
    in_place, _ = keep(*call, leaves, position, valid, W, in_place=True)
    assert torch.equal(in_place, out)
    assert_same_slots(leaves, expected[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "K", "P", "W", "used", "valid", "ties"),
    [
        (5, 4, 2, 16, 8, None, None, False),  # no key can leave
        (37, 2, 1, 16, 7, None, None, False),
        (17, 3, 3, 12, 5, 0, None, False),  # slots, all of them empty
        (16, 3, 1, 8, 5, 3, [16, 0, 9], True),
        (8, 4, 1, 16, 1, 1, [8, 3, 8], True),
        (9, 4, 2, 16, 30, 20, None, True),  # more slots than tokens
        (1, 4, 1, 16, 7, 7, None, True),
        (1, 6, 2, 12, 40, 9, [1, 0, 1], True),
        (1, 4, 2, 16, 33, 33, None, False),
        (1, 2, 2, 16, 6, 0, [0, 1, 0], False),  # a row without any key
    ],
)
def test_keep_window_attention(dtype, T, H, K, P, W, used, valid, ties):
    g, B = seeded(T), 3 if valid else 1
    call = tokens(g, B, T, H, K, P, dtype, ties)
    state, position = (None, None) if used is None else slots(g, B, K, W, P, used, dtype, ties)
    compare(dtype, call, state, position, None if valid is None else torch.tensor(valid, device=DEVICE), W)


@pytest.mark.skipif(not ON_CUDA, reason="too much for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 31, 32, 33, 127, 128, 129, 2047, 2048, 2049, 4099])
@pytest.mark.parametrize(("H", "K", "P", "W", "used"), [(16, 4, 128, 256, 100), (6, 2, 80, 77, 77), (8, 8, 64, 2048, 0)])
def test_keep_window_attention_at_full_tiles(dtype, T, H, K, P, W, used):
    g = seeded(T)
    call = tokens(g, 1, T, H, K, P, dtype, ties=bool(T % 2))
    compare(dtype, call, None, None, None, W)
    compare(dtype, call, *slots(g, 1, K, W, P, used, dtype, ties=bool(T % 2), before=3 * W), None, W)


@pytest.mark.parametrize("scores", ["rising", "falling", "equal", "large"])
def test_keep_window_attention_of_ordered_scores(scores):
    T, W = (23, 6) if not ON_CUDA else (3000, 512)
    call = tokens(seeded(), 1, T, 2, 1, 16)
    ramp = torch.linspace(-1, 1, T, device=DEVICE)
    score = {"rising": ramp, "falling": -ramp, "equal": ramp * 0 - 0.0, "large": 2e38 * ramp}[scores]
    if scores == "equal":
        score[::3] = 0.0  # equals -0.0, so that the later one is kept
    compare(torch.float32, (*call[:3], score.view(1, T, 1)), None, None, None, W)


def test_keep_window_attention_in_pieces_is_that_of_the_whole():
    g, W = seeded(3), 9
    call = tokens(g, 1, 31, 2, 1, 16, ties=True)
    state, position = slots(g, 1, 1, W, 16, 4, ties=True)
    whole, after = keep(*call, state, position, None, W)
    pieces, leaves = [], tuple(leaf.clone() for leaf in state)
    for part in zip(*(x.split([11, 1, 16, 3], 1) for x in call), strict=True):
        pieces.append(keep(*part, leaves, position + sum(piece.shape[1] for piece in pieces), None, W, in_place=True)[0])
    check(OP, torch.float32, torch.cat(pieces, 1), whole.double())
    assert_same_slots(leaves, after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "K", "P", "W", "used", "ties"),
    [(11, 4, 2, 16, 7, 3, True), (7, 3, 1, 12, 40, 0, False), *([(900, 16, 4, 128, 256, 100, False)] if ON_CUDA else [])],
)
def test_exact_keep_window_attention_has_the_same_bits_for_every_split(dtype, T, H, K, P, W, used, ties):
    g, B = seeded(T), 2 if ON_CUDA else 1
    call = tokens(g, B, T, H, K, P, dtype, ties)
    state, position = slots(g, B, K, W, P, used, dtype, ties)
    whole, after = exactly(keep, *call, state, position, None, W)
    expected = keep_window_attention_reference(*wide(call), *wide(state), position, None, W)
    check(OP, dtype, whole, expected[0])
    assert_same_slots(after, expected[1:])
    for sizes in ([1] * T, [T // 2, 1, T - T // 2 - 1]):
        leaves, outs, seen = [scattered(leaf.clone(), seed) for seed, leaf in enumerate(state)], [], 0
        for part in zip(*(x.split(sizes, 1) for x in call), strict=True):
            outs.append(exactly(keep, *part, tuple(leaves), position + seen, None, W, in_place=True)[0])
            seen += part[0].shape[1]
        assert torch.equal(torch.cat(outs, 1), whole)
        assert all(torch.equal(leaf, end) for leaf, end in zip(leaves, after, strict=True))  # in the same slots, too
    if used == 0:
        assert torch.equal(exactly(keep, *call, None, None, None, W)[0], whole)


def test_exact_keep_window_attention_leaves_out_tokens_that_do_not_count():
    g, T, W, valid = seeded(5), 8, 6, torch.tensor([0, 5, 8], device=DEVICE)
    call = tokens(g, 3, T, 4, 2, 16)
    state, position = slots(g, 3, 2, W, 16, 4)
    out, after = exactly(keep, *call, state, position, valid, W)
    expected = keep_window_attention_reference(*wide(call), *wide(state), position, valid, W)
    counts = torch.arange(T, device=DEVICE) < valid.unsqueeze(1)
    assert out.isfinite().all()
    check(OP, torch.float32, out[counts], expected[0][counts])
    assert_same_slots(after, expected[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", ["none", "additive", "binary"])
def test_exact_attention_over_cells_has_the_same_bits_for_every_split(dtype, scoring):
    from wm_kernels.attention.triton_op import attend_triton

    g, (B, T, H, K, P, S) = seeded(), (2, 300, 8, 2, 64, 2500) if ON_CUDA else (1, 9, 4, 2, 16, 75)
    q, score = random(g, B, T, H, P, dtype=dtype), random(g, B, H, S) + 0.8
    cells = random(g, B, K, S, P, dtype=dtype), random(g, B, K, S, P, dtype=dtype)
    position = torch.tensor([3, S - T] if ON_CUDA else [58], device=DEVICE)  # across a chunk's end

    def attend(start, end):
        return exactly(attend_triton, q[:, start:end], *cells, position + start, None if scoring == "none" else score, scoring)

    whole = attend(0, T)
    assert torch.equal(torch.cat([attend(t, t + 1) for t in range(T)], 1), whole)
    assert torch.equal(torch.cat([attend(0, 4), attend(4, T)], 1), whole)
    check("scored_attention", dtype, whole, attend_triton(q, *cells, position, None if scoring == "none" else score, scoring).double())


@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("op", ["attention", "additive", "binary", "ratio", "keep_window_attention"])
def test_exact_ops_on_cuda_have_the_same_bits_for_every_split(op):
    g, (B, T, H, K, P, S, dtype) = seeded(), (2, 90, 8, 2, 64, 128, torch.bfloat16)
    q, k, v, score = tokens(g, B, T, H, K, P, dtype)
    position = torch.tensor([0, 20], device=DEVICE)
    caches = [random(g, B, K, S, P, dtype=dtype), random(g, B, K, S, P, dtype=dtype), random(g, B, K, S)]
    state, _ = slots(g, B, K, 33, P, 10, dtype)

    def split(sizes):
        leaves, outs, seen = [leaf.clone() for leaf in (state if op == "keep_window_attention" else caches)], [], 0
        for part in zip(*(x.split(sizes, 1) for x in (q, k, v, score)), strict=True):
            at, seen = position + 100 + seen if op == "keep_window_attention" else position + seen, seen + part[0].shape[1]
            if op == "attention":
                outs.append(exactly(torch.ops.wm.attention_, *part[:3], *leaves[:2], at, None))
            elif op == "keep_window_attention":
                outs.append(exactly(torch.ops.wm.keep_window_attention_, *part, *leaves, at, None, 33))
            else:
                outs.append(exactly(torch.ops.wm.scored_attention_, *part, *leaves, at, None, op, 0.3))
        return [torch.cat(outs, 1), *leaves]

    whole = split([T])
    for sizes in ([1] * T, [2, 41, 47]):
        assert all(torch.equal(a, b) for a, b in zip(split(sizes), whole, strict=True))
    if op == "attention":
        assert torch.equal(exactly(torch.ops.wm.attention, q[:1], k[:1], v[:1], None, None, None, None)[0], whole[0][:1])


@pytest.mark.parametrize("T", [1, 19])
def test_keep_window_attention_of_any_strides(T):
    g, W = seeded(4), 6
    call = tokens(g, 2, T, 4, 2, 16)
    state, position = slots(g, 2, 2, W, 16, 5)
    expected, after = keep(*call, state, position, None, W)
    strided = [scattered(x, seed) for seed, x in enumerate(call)]
    strided[2] = call[2].transpose(2, 3).contiguous().transpose(2, 3)  # no contiguous rows: copied
    strided[3] = call[3].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [scattered(leaf.clone(), 9 + seed) for seed, leaf in enumerate(state)]
    leaves[0] = state[0].transpose(2, 3).contiguous().transpose(2, 3)
    leaves[3] = state[3].transpose(1, 2).contiguous().transpose(1, 2)
    got, _ = keep(*strided, tuple(leaves), position, None, W, in_place=True)
    assert torch.equal(got, expected)
    assert_same_slots(leaves, after)


@pytest.mark.parametrize("exact", [False, True])
def test_scratch_is_linear_in_tokens(exact):
    from wm_kernels.keep_window_attention.plan import Call, plan, regime

    def size(T):
        strides = (*((name, (T * 512, 512, 128, 1)) for name in "qkv"), ("score", (T * 4, 4, 1)))
        made = plan(Call(1, T, 4, 4, 128, 2048, False, False, False, torch.bfloat16, "sm_90", strides, exact))
        return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in made.scratch.values())

    assert size(2**17) <= 2.01 * size(2**16)
    assert size(2**17) <= 2**17 * 4 * 2 * 128 * 2  # less than the keys and values of the call
    assert [regime(1, 8, True), regime(2, 8, True), regime(8, 8, False), regime(9, 8, False)] == ["step", "listed", "causal", "listed"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "K", "A", "P", "S", "scoring", "cached"),
    [
        (33, 4, 2, 1, 16, 50, "none", True),
        (17, 6, 2, 1, 12, 17, "none", False),
        (40, 6, 2, 3, 12, 60, "additive", True),  # score heads that are no multiple of kv heads
        (37, 4, 2, 1, 12, 37, "binary", False),
        (23, 4, 1, 4, 12, 60, "additive", True),
        (1, 4, 2, 4, 12, 60, "additive", True),
        (3, 4, 2, 2, 12, 60, "binary", True),
        (1, 6, 3, 1, 12, 60, "none", True),
    ],
)
def test_attention_over_cells(dtype, T, H, K, A, P, S, scoring, cached):
    from wm_kernels.attention.triton_op import attend_triton

    g, B = seeded(T), 2
    q, k, v, _ = tokens(g, B, T, H, K, P, dtype)
    score = random(g, B, T, A) + 0.8
    caches = (random(g, B, K, S, P, dtype=dtype), random(g, B, K, S, P, dtype=dtype), random(g, B, A, S) + 0.8)
    position = torch.tensor([0, S - T], device=DEVICE) if cached else None
    given = caches if cached else (None,) * 3
    if scoring == "none":
        expected, *written = attention_reference(*wide((q, k, v)), *wide(given[:2]), position, None)
    else:
        expected, *written = scored_attention_reference(*wide((q, k, v, score)), *wide(given), position, None, scoring, 0.0)
    cells = (k.transpose(1, 2), v.transpose(1, 2), score.transpose(1, 2))
    if cached:
        cells = tuple(leaf.to(cell.dtype) for leaf, cell in zip(written, cells[: len(written)], strict=True))
    cells = [scattered(cell, seed) for seed, cell in enumerate(cells)]
    scores = cells[2] if scoring != "none" else None
    got = attend_triton(scattered(q, 5), cells[0], cells[1], position, scores, scoring)
    check("scored_attention", dtype, got, expected)
    assert torch.equal(got, attend_triton(q, cells[0], cells[1], position, scores, scoring))
    if cached:  # the kernels write the tokens themselves, and no other cell
        own = [scattered(cache.clone(), seed) for seed, cache in enumerate(caches[:2])]
        tokens_ = scattered(k, 7), scattered(v, 8)
        assert torch.equal(got, attend_triton(q, *own, position, scores, scoring, tokens_))
        assert all(torch.equal(leaf, cell) for leaf, cell in zip(own, cells, strict=False))
        outside = [leaf.clone() for leaf in own]
        attend_triton(q, *own, torch.full_like(position, S + 1), scores, scoring, tokens_)
        assert all(torch.equal(leaf, before) for leaf, before in zip(own, outside, strict=True))


def test_wider_heads_have_smaller_tiles():
    from wm_kernels.attention.plan import fitted

    assert fitted({"BLOCK_R": 128, "BLOCK_N": 64, "num_warps": 8}, 512) == {"BLOCK_R": 32, "BLOCK_N": 16, "num_warps": 8}


@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("T", [1, 300])
def test_the_ops_launch_the_kernels_on_cuda(T, in_place):
    g, W = seeded(), 64
    call = tokens(g, 2, T, 4, 2, 64, torch.bfloat16)
    state, position = slots(g, 2, 2, W, 64, 40, torch.bfloat16)
    expected, after = keep(*call, state, position, None, W)
    leaves = [leaf.clone() for leaf in state]
    name = "keep_window_attention_" if in_place else "keep_window_attention"
    got = getattr(torch.ops.wm, name)(*call, *leaves, position, None, W)
    got, *leaves = (got, *leaves) if in_place else got
    assert torch.equal(got, expected)
    assert_same_slots(leaves, after)


@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("op", ["keep", "keep with slots", "exact", "cells", "cached", "rope"])
def test_two_compilations_serve_every_length(op):
    from wm_kernels.attention import triton_kernel as cells
    from wm_kernels.attention.triton_op import attend_triton
    from wm_kernels.keep_window_attention import triton_exact, triton_kernel, triton_select
    from wm_kernels.rope import triton_kernel as rope
    from wm_kernels.rope.triton_op import rope_triton

    def compiled():
        modules = (cells, triton_exact, triton_kernel, triton_select, rope)
        kernels = {id(k): (name, k) for module in modules for name, k in vars(module).items() if hasattr(k, "device_caches")}
        return {name: sum(len(known[0]) for known in kernel.device_caches.values()) for name, kernel in kernels.values()}

    g, before, (B, H, K, P, W) = seeded(), compiled(), (2, 32, 16, 48, 37)  # dims that no other test has
    state, position = slots(g, B, K, W, P, 20, torch.bfloat16)
    caches = random(g, B, K, 700, P, dtype=torch.bfloat16), random(g, B, K, 700, P, dtype=torch.bfloat16)
    calls = {
        "keep": lambda q, k, v, score: keep(q, k, v, score, None, None, None, W),
        "keep with slots": lambda *call: keep(*call, state, position, None, W),
        "exact": lambda *call: exactly(keep, *call, state, position, None, W),
        "cells": lambda q, k, v, _: attend_triton(q, k.transpose(1, 2), v.transpose(1, 2), None),
        "cached": lambda q, *_: attend_triton(q, *caches, position),
        "rope": lambda q, *_: rope_triton(q, *(random(g, B, q.shape[1], 16) for _ in range(2))),
    }
    lengths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 36, 37, 38, 47, 48, 49, *range(60, 552, 10)]
    assert len(lengths) >= 64
    for T in lengths:
        calls[op](*tokens(g, B, T, H, K, P, torch.bfloat16))
    made = {name: count - before[name] for name, count in compiled().items() if count > before[name]}
    assert made
    assert max(made.values()) <= 2, made


@pytest.mark.skipif(not ON_CUDA, reason="takes a GPU's memory")
def test_more_elements_than_32_bits_count():
    from wm_kernels.attention.triton_op import attend_triton
    from wm_kernels.rope.triton_op import rope_triton

    g, (T, H, K, P, W) = torch.Generator("cuda").manual_seed(0), (2**20 + 77, 16, 4, 128, 2048)
    q, k, v = (torch.randn(1, T, heads, P, generator=g, device=DEVICE, dtype=torch.bfloat16) for heads in (H, K, K))
    score = torch.randn(1, T, K, generator=g, device=DEVICE)
    assert q.numel() > 2**31
    out, _ = keep(q, k, v, score, None, None, None, W)
    for kv in range(K):
        kept = score[0, :, kv].argsort(descending=True)[:W]
        heads = slice(kv * H // K, (kv + 1) * H // K)
        logits = q[0, -1, heads].double() @ k[0, kept, kv].double().T * P**-0.5 + score[0, kept, kv].double()
        check(OP, torch.bfloat16, out[0, -1, heads], logits.softmax(-1) @ v[0, kept, kv].double())
    cos, sin = (torch.randn(1, T, P // 2, generator=g, device=DEVICE) for _ in range(2))
    assert torch.equal(rope_triton(q, cos, sin)[:, -3:], rope_triton(q[:, -3:], cos[:, -3:], sin[:, -3:]))
    del out, q, k, v, cos, sin
    B, S = 64, 2**16 + 8
    cells = [torch.randn(B, K, S, P, generator=g, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    assert cells[0].numel() > 2**31
    queries = torch.randn(B, 1, H, P, generator=g, device=DEVICE, dtype=torch.bfloat16)
    got = attend_triton(queries, *cells, torch.full((B,), S - 1, device=DEVICE))
    expected = attend_triton(queries[-1:], *(x[-1:].clone() for x in cells), torch.full((1,), S - 1, device=DEVICE))
    check("attention", torch.bfloat16, got[-1:], expected.double())


@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_has_the_same_bits_for_every_split(dtype):
    from wm_kernels.rope.triton_op import rope_triton

    g = seeded()
    x, cos, sin = random(g, 2, 700, 6, 48, dtype=dtype), random(g, 2, 700, 24), random(g, 2, 700, 24)
    parts = [rope_triton(*part) for part in zip(*(y.split([1, 100, 599], 1) for y in (x, cos, sin)), strict=True)]
    assert torch.equal(torch.cat(parts, 1), rope_triton(x, cos, sin))


@pytest.mark.parametrize("op", ["attention", OP])
def test_the_last_configurations_serve_every_architecture(op):
    rows = json.loads(files("wm_kernels").joinpath(op, "triton_configs.json").read_text(encoding="utf-8"))
    for regime in {row["regime"] for row in rows}:
        last = [row for row in rows if row["regime"] == regime][-1]
        assert set(last) == {"regime", "values"}


def packed(g, B, T, H, K, P, F, S, dtype):
    """A packed projection, angles and caches."""
    qkv, angle = random(g, B, T, (H + 2 * K) * P, dtype=dtype), random(g, B, T, F)
    return qkv, angle.cos(), angle.sin(), random(g, B, K, S, P, dtype=dtype), random(g, B, K, S, P, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "K", "P", "F", "S", "position"),
    [
        (1, 4, 2, 16, 8, 40, [0, 39]),
        (7, 3, 1, 12, 4, 40, [33, 5]),  # some entries of a head are not rotated
        (21, 2, 2, 20, 10, 40, [0, 19]),
        *([(1, 16, 4, 128, 64, 5000, [4999, 17]), (700, 16, 4, 64, 32, 3000, [0, 2300])] if ON_CUDA else []),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_attention_from_a_packed_projection(dtype, T, H, K, P, F, S, position, strided):
    from wm_kernels.attention_rope.triton_op import attend_packed_triton

    qkv, cos, sin, *caches = packed(seeded(T), len(position), T, H, K, P, F, S, dtype)
    position = torch.tensor(position, device=DEVICE)
    expected = attention_rope_reference(*wide((qkv, cos, sin, *caches)), position, None, H, K, P)
    if strided:
        qkv, cos, sin, *caches = (scattered(tensor, seed) for seed, tensor in enumerate((qkv, cos, sin, *caches)))
    before = [cache.clone() for cache in caches]
    out = attend_packed_triton(qkv, cos, sin, *caches, position, H)
    check("attention_rope", dtype, out, expected[0])
    cell = torch.arange(S, device=DEVICE)
    written = (cell >= position[:, None]) & (cell < position[:, None] + T)
    for cache, after, was in zip(caches, expected[1:], before, strict=True):
        check("attention_rope", dtype, cache.transpose(1, 2)[written], after.transpose(1, 2)[written])
        assert torch.equal(cache.transpose(1, 2)[~written], was.transpose(1, 2)[~written])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_attention_from_a_packed_projection_has_the_same_bits_for_every_split(dtype):
    from wm_kernels.attention_rope.triton_op import attend_packed_triton

    B, T, H, K, P, F, S = (2, 300, 8, 2, 64, 32, 2500) if ON_CUDA else (1, 9, 4, 2, 16, 6, 75)
    qkv, cos, sin, *caches = packed(seeded(), B, T, H, K, P, F, S, dtype)
    position = torch.full((B,), S - T - 8, device=DEVICE)

    def attend(sizes):
        leaves, outs, seen = [cache.clone() for cache in caches], [], 0
        for part in zip(*(x.split(sizes, 1) for x in (qkv, cos, sin)), strict=True):
            outs.append(exactly(attend_packed_triton, *part, *leaves, position + seen, H))
            seen += part[0].shape[1]
        return [torch.cat(outs, 1), *leaves]

    whole = attend([T])
    for sizes in ([1] * T, [T // 2, 1, T - T // 2 - 1]):
        assert all(torch.equal(one, other) for one, other in zip(attend(sizes), whole, strict=True))


@pytest.mark.skipif(not ON_CUDA, reason="the op launches kernels on CUDA alone")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_rope_is_its_kernels_on_cuda(dtype, monkeypatch):
    import wm_kernels as wm
    from wm_kernels.attention_rope import triton_op

    H, K, P = 4, 2, 16
    qkv, cos, sin, *caches = packed(seeded(), 2, 5, H, K, P, 8, 40, dtype)
    position = torch.tensor([0, 30], device=DEVICE)
    ran, run = [], triton_op.run
    monkeypatch.setattr(triton_op, "run", lambda plan, tensors: (ran.append(plan), run(plan, tensors)))
    leaves = [cache.clone() for cache in caches]
    out = wm.attention_rope_(qkv, cos, sin, *leaves, position, None, H, K, P)
    apart = wm.attention_rope(qkv, cos, sin, *caches, position, None, H, K, P)
    assert len(ran) == 2
    assert all(torch.equal(one, other) for one, other in zip(apart, (out, *leaves), strict=True))
    expected = attention_rope_reference(*wide((qkv, cos, sin, *caches)), position, None, H, K, P)
    check("attention_rope", dtype, out, expected[0])
    with pytest.raises(RuntimeError, match=r"wm::attention_rope_: qkv_BTC is"):
        wm.attention_rope_(qkv[..., :-1], cos, sin, *leaves, position, None, H, K, P)
