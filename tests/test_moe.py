"""`router_topk` and `moe_mix` against independent loops in float64, against transformers, and the judgement of a router's choices.

The last test exports a layer of them and of `scored_attention`.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import wm_kernels as wm
from onnx_cases import session_of_program
from wm_graph.taps import Taps
from wm_graph.tolerances import score_budget
from wm_kernels.moe_mix import moe_mix_reference
from wm_kernels.moe_mix.definition import _gathered
from wm_runtimes.selections import judge_router

D = torch.float64


def near(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(E=st.integers(1, 9), k=st.integers(1, 9), tied=st.booleans(), normalize=st.booleans(), seed=st.integers(0, 99))
def test_router_topk_equals_the_loop(E, k, tied, normalize, seed):
    g, k = torch.Generator().manual_seed(seed), min(k, E)
    logits = torch.randint(-1, 2, (5, E), generator=g).double() if tied else 3 * torch.randn((5, E), generator=g, dtype=D)
    weight, expert = wm.router_topk(logits, k, normalize)
    expected_weight, expected_expert = oracles.router_topk(logits, k, normalize)
    assert torch.equal(expert, expected_expert)
    near(weight, expected_weight)


def test_router_topk_tells_apart_logits_whose_probabilities_round_to_one_number():
    # float32 gives both experts the same probability, 0 after the first.
    logits = torch.tensor([[0.0, -200.0, -199.0]])
    assert wm.router_topk(logits, 2, False)[1].tolist() == [[0, 2]]


def moe_call(M: int, k: int = 2, gated: bool = True, bias: bool = False, activation: str = "silu", seed: int = 0) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    E, W, I = 5, 6, 4
    F = 2 * I if gated else I
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=D)  # noqa: E731
    expert = torch.randint(0, E - 1, (M, k), generator=g)  # the last one is never chosen
    biases = (normal(E, F), normal(E, W)) if bias else (None, None)
    return normal(M, W), expert, normal(M, k), normal(E, F, W), biases[0], normal(E, W, I), biases[1], activation, gated


@pytest.mark.parametrize("M", [1, 2, 9])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_moe_mix_equals_the_loop(M, gated, bias, activation):
    call = moe_call(M, 3, gated, bias, activation)
    for run in (wm.moe_mix, _gathered):
        near(run(*call), oracles.moe_mix(*call))


def test_moe_mix_of_no_token_is_empty():
    call = moe_call(3)
    assert wm.moe_mix(*(value[:0] for value in call[:3]), *call[3:]).shape == (0, 6)


def test_moe_mix_reads_no_expert_that_was_not_chosen():
    x, expert, weight, inner, _, outer, _, *rest = moe_call(1)
    expected = wm.moe_mix(x, expert, weight, inner, None, outer, None, *rest)
    for e in set(range(5)) - set(expert.flatten().tolist()):
        inner[e] = outer[e] = torch.nan
    assert torch.equal(wm.moe_mix(x, expert, weight, inner, None, outer, None, *rest), expected)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_gradient_of_moe_mix_is_that_of_its_reference(gated, activation):
    call = moe_call(7, 3, gated, True, activation)
    leaves = [value.requires_grad_() for value in call if isinstance(value, torch.Tensor) and value.is_floating_point()]
    grads = [torch.autograd.grad(run(*call).square().sum(), leaves) for run in (wm.moe_mix, moe_mix_reference)]
    for actual, expected in zip(*grads, strict=True):
        near(actual, expected)


def test_training_step_compiled_once_has_the_eager_gradients_at_two_lengths():
    def loss(x, logits, inner, outer):
        weight, expert = wm.router_topk(logits, 2, True)
        return wm.moe_mix(x, expert, weight, inner, None, outer, None, "silu", True).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tokens, stance in ((5, "default"), (7, "fail_on_recompile")):
        x, _, _, inner, _, outer, *_ = moe_call(tokens)
        call = [value.requires_grad_() for value in (x, x[:, :5].clone(), inner, outer)]
        for value in call[:2]:
            torch._dynamo.maybe_mark_dynamic(value, 0)
        expected = torch.autograd.grad(loss(*call), call)
        with torch.compiler.set_stance(stance):
            gradients = torch.autograd.grad(compiled(*call), call)
        for actual, gradient in zip(gradients, expected, strict=True):
            near(actual, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_float32_sums(dtype):
    call = tuple(value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in moe_call(9))
    y, exact = wm.moe_mix(*call), oracles.moe_mix(*call)
    assert y.dtype == dtype
    assert float((y.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())


def random_module(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=g)
    return module.eval()


def mixture(x_BTD, router, experts, k, normalize):
    x_MD = x_BTD.flatten(0, 1)
    weight, expert = wm.router_topk(x_MD @ router.T, k, normalize)
    y_MD = wm.moe_mix(x_MD, expert, weight, experts.gate_up_proj, None, experts.down_proj, None, "silu", True)
    return y_MD.view(x_BTD.shape)


@pytest.mark.parametrize("T", [1, 13])
def test_mixture_equals_jamba(T):
    transformers = pytest.importorskip("transformers")
    from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
    block = random_module(JambaSparseMoeBlock(transformers.JambaConfig(**sizes)), 0)
    x = torch.randn((2, T, 16), generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        near(mixture(x, block.router.weight, block.experts, 2, False), block(x), 2e-5)


@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("normalize", [False, True])
def test_mixture_equals_the_experts_of_qwen2_moe(T, normalize):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": normalize}
    block = random_module(Qwen2MoeSparseMoeBlock(transformers.Qwen2MoeConfig(**sizes)), 1)
    x = torch.randn((2, T, 16), generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        x_MD = x.flatten(0, 1)
        shared = torch.sigmoid(block.shared_expert_gate(x_MD)) * block.shared_expert(x_MD)
        near(mixture(x, block.gate.weight, block.experts, 3, normalize) + shared.view(x.shape), block(x), 2e-5)


def test_taps_replay_the_router_with_this_models_weights():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    expert = torch.tensor([[[1, 2], [2, 0]]])  # [B, T, k]
    for normalize in (False, True):
        made = wm.router_topk(logits, 2, normalize)
        assert Taps().choose_routed("layers.0", logits, normalize, made) is made
        weight, chosen = Taps({"layers.0.router_topk.expert": expert}).choose_routed("layers.0", logits, normalize, made)
        assert torch.equal(chosen, expert[0])
        power = logits.exp().gather(-1, expert[0])
        near(weight, power / (power if normalize else logits.exp()).sum(-1, keepdim=True), 1e-6)


def routed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 8 experts for 2 rows of 3 tokens, and their order, best first."""
    logits = np.random.default_rng(seed).normal(size=(2, 3, 8))
    return logits, np.argsort(-logits, -1)


def test_own_routes_in_any_order_pass():
    logits, order = routed()
    verdict = judge_router(logits, order[..., [2, 0, 1]], 0.0)
    assert (verdict.chosen, verdict.differing, verdict.excess) == (18, 0, 0.0)


def test_a_wrong_route_with_a_big_margin_fails_and_a_near_tie_passes():
    logits, order = routed()
    wrong = order[..., :3].copy()
    wrong[1, 2, 2] = order[1, 2, 3]
    verdict = judge_router(logits, wrong, 1e-6)
    assert verdict.differing == 1
    assert not verdict.passed
    assert judge_router(logits, wrong, verdict.excess * 1.01e-6).passed
    assert not judge_router(logits, wrong, verdict.excess * 0.99e-6).passed
    mask = np.ones((2, 3), bool)
    mask[1, 2] = False
    assert judge_router(logits, wrong, 1e-6, mask).differing == 0
    close = logits.copy()
    close[1, 2, order[1, 2, 3]] = close[1, 2, order[1, 2, 2]] - 1e-7
    assert judge_router(close, wrong, score_budget("router_topk", "float32").relative).passed


@pytest.mark.parametrize("value", [-1, 8, "repeat"])
def test_routes_that_cannot_be_fail_whatever_the_budget(value):
    logits, order = routed()
    picks = order[..., :3].copy()
    picks[0, 0, 1] = picks[0, 0, 0] if value == "repeat" else value
    assert judge_router(logits, picks, 1e9).excess == math.inf


class Layer(torch.nn.Module):
    """Scored attention, a router and a mixture of experts over its output; x is B, T, H * P."""

    def __init__(self, scoring: str, bias: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=g))  # noqa: E731
        self.scoring = scoring
        self.qkv, self.score, self.router = normal(32, 16), normal(2, 16), normal(5, 16)
        self.inner, self.outer = normal(5, 12, 16), normal(5, 16, 6)
        self.inner_bias, self.outer_bias = (normal(5, 12), normal(5, 16)) if bias else (None, None)

    def forward(self, x, cache_k, cache_v, cache_score, position, valid):
        q, k, v = F.linear(x, self.qkv).unflatten(-1, (8, 4)).split([4, 2, 2], 2)
        caches = (cache_k, cache_v, cache_score)
        out, *caches = wm.scored_attention(q, k, v, F.linear(x, self.score), *caches, position, valid, self.scoring, 0.29)
        y = out.reshape(-1, 16)
        weight, expert = wm.router_topk(F.linear(y, self.router), 2, self.scoring == "ratio")
        y = wm.moe_mix(y, expert, weight, self.inner, self.inner_bias, self.outer, self.outer_bias, "silu", True)
        return y.view(x.shape), *caches


def layer_call(T, seed=0, S=12):
    x = torch.randn((2, T, 16), generator=torch.Generator().manual_seed(seed))
    return (
        x,
        torch.zeros(2, 2, S, 4),
        torch.zeros(2, 2, S, 4),
        torch.zeros(2, 2, S),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([T, T]),
    )


@pytest.mark.parametrize("flavour", ["portable", "ort"])
@pytest.mark.parametrize(("scoring", "bias"), [("additive", False), ("binary", True), ("ratio", False)])
@torch.no_grad()
def test_an_exported_layer_keeps_its_caches_over_calls(flavour, scoring, bias):
    rows, tokens, cells = (torch.export.Dim(name, min=1, max=4096) for name in ("rows", "tokens", "cells"))
    cache, row = {0: rows, 2: cells}, {0: rows}
    layer = Layer(scoring, bias)
    program = torch.export.export(layer, layer_call(5), dynamic_shapes=({0: rows, 1: tokens}, cache, cache, cache, row, row))
    run = session_of_program(program, flavour)
    names = [value.name for value in run.get_inputs()]
    _, *caches, position, _ = layer_call(1)
    theirs = [value.numpy() for value in caches]
    for seed, count in enumerate((5, 1, 1, 3)):
        x, *_, valid = layer_call(count, seed)
        expected, *caches = layer(x, *caches, position, valid)
        feeds = dict(zip(names, [x.numpy(), *theirs, position.numpy(), valid.numpy()], strict=True))
        found, *theirs = run.run(None, feeds)
        near(torch.from_numpy(found), expected, 2e-5 * float(expected.abs().max()))
        for value, other in zip(caches, theirs, strict=True):
            near(torch.from_numpy(other), value, 1e-5)
        position = position + count
