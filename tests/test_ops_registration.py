"""Registration: fake kernels, autograd, the in-place forms, the errors, and torch.compile."""

import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import wm_kernels as wm
from wm_kernels.attention import attention_reference
from wm_kernels.keep_window_attention import keep_window_attention_reference

D = torch.float64
B, T, H, K, P, G, N, F, W = 2, 3, 4, 2, 4, 2, 6, 2, 2


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def scan_call(tokens, state, valid, rotated, dtype=torch.float32):
    x, b, c = normal(B, tokens, H, P, dtype=dtype), normal(B, tokens, G, N, dtype=dtype), normal(B, tokens, G, N, dtype=dtype) + 0.1
    dt, A = normal(B, tokens, H, dtype=dtype).abs(), -normal(H, dtype=dtype).abs()
    angles = wm.rope_angles(torch.arange(tokens).repeat(B, 1), F, 100.0, dtype == D) if rotated else ()
    return (
        x,
        dt,
        A,
        b,
        c,
        *angles,
        normal(B, H, N, P, dtype=dtype) if state else None,
        torch.tensor([tokens, tokens - 1]) if valid else None,
    )


def qkv(tokens, dtype=torch.float32):
    return normal(B, tokens, H, P, dtype=dtype), normal(B, tokens, K, P, dtype=dtype), normal(B, tokens, K, P, dtype=dtype) + 0.1


def cells(tokens):
    return 9 if tokens <= T else 80


def attention_call(tokens, state, valid, dtype=torch.float32):
    shape = (B, K, cells(tokens), P)
    cache = (normal(*shape, dtype=dtype), normal(*shape, dtype=dtype) + 0.1, torch.tensor([4, 0])) if state else (None, None, None)
    return *qkv(tokens, dtype), *cache, torch.tensor([tokens, tokens - 1]) if valid else None


def attention_rope_call(tokens, state, valid, dtype=torch.float32):
    q, k, v, *cache, position, valid_B = attention_call(tokens, state, valid, dtype)
    start = torch.zeros(B, dtype=torch.int64) if position is None else position
    angles = wm.rope_angles(start[:, None] + torch.arange(tokens), F, 100.0, dtype == D)
    return torch.cat([q, k, v], 2).flatten(2), *angles, *cache, position, valid_B, H, K, P


def keep_call(tokens, state, valid, dtype=torch.float32):
    slots = (None,) * 5
    if state:
        score, position = normal(B, K, W, dtype=dtype), torch.tensor([[5, 2], [-1, -1]]).unsqueeze(1).repeat(1, K, 1)
        score = score.masked_fill(position < 0, -torch.inf)
        slots = normal(B, K, W, P, dtype=dtype), normal(B, K, W, P, dtype=dtype) + 0.1, score, position, torch.tensor([6, 0])
    valid_B = torch.tensor([tokens, tokens - 1]) if valid else None
    return *qkv(tokens, dtype), normal(B, tokens, K, dtype=dtype), *slots, valid_B, W


def conv_call(tokens, state, valid, dtype=torch.float32):
    valid_B = torch.tensor([tokens, tokens - 1]) if valid else None
    state_BYC = normal(B, 2, P, dtype=dtype) if state else None
    return normal(B, tokens, P, dtype=dtype), normal(P, 3, dtype=dtype), normal(P, dtype=dtype), state_BYC, valid_B, "silu"


def selective_call(tokens, state, valid, dtype=torch.float32):
    x, dt, A = normal(B, tokens, P, dtype=dtype), normal(B, tokens, P, dtype=dtype).abs(), -normal(P, N, dtype=dtype).abs()
    valid_B = torch.tensor([tokens, tokens - 1]) if valid else None
    state_BCN = normal(B, P, N, dtype=dtype) if state else None
    return x, dt, A, normal(B, tokens, N, dtype=dtype), normal(B, tokens, N, dtype=dtype) + 0.1, state_BCN, valid_B


def scored_call(tokens, state, valid, dtype=torch.float32, scoring="additive", A=K):
    q, k, v, *cache, position, valid_B = attention_call(tokens, state, valid, dtype)
    # Above 1 for about half of the keys, below it for about half of them.
    scores = normal(B, tokens, A, dtype=dtype) + 1, *cache, normal(B, A, cells(tokens), dtype=dtype) + 1 if state else None
    return q, k, v, *scores, position, valid_B, scoring, 0.6


def moe_call(gated, dtype=torch.float32, M=5):
    x, weight = normal(M, 8, dtype=dtype), normal(M, 2, dtype=dtype)
    expert = torch.tensor([[0, 3], [3, 1], [3, 3], [0, 1], [1, 3]]).repeat(M // 5 + 1, 1)[:M]
    rows = 12 if gated else 6
    tables = normal(4, rows, 8, dtype=dtype), normal(4, 8, 6, dtype=dtype)
    biases = (None, None) if gated else (normal(4, rows, dtype=dtype), normal(4, 8, dtype=dtype))
    return x, expert, weight, tables[0], biases[0], tables[1], biases[1], "silu" if gated else "gelu", gated


def linear_call(parts, dtype=torch.float32, M=5, gated=False, bias=True):
    N, H = sum(parts) * (2 if gated else 1), parts[3]
    biases = normal(N, dtype=dtype) if bias else None, normal(H, dtype=dtype) + 0.1 if H else None
    return normal(M, 8, dtype=dtype), normal(N, 8, dtype=dtype), *biases, *parts, gated


def plain_calls(dtype=torch.float32, T=T):
    cos, sin = wm.rope_angles(torch.arange(T).repeat(B, 1), F, 100.0, dtype == D)
    x, weight = normal(T + 2, 8, dtype=dtype), normal(8, dtype=dtype)
    expert = torch.tensor([[[[0, 3], [3, 7]]] * T] * B)
    mix = normal(B, T, 8, dtype=dtype), expert, normal(B, T, 2, 2, dtype=dtype), normal(9, 8, dtype=dtype), normal(9, 8, dtype=dtype)
    return {
        "rope": (wm.rope, (normal(B, T, H, P, dtype=dtype), cos, sin)),
        "rope part": (wm.rope, (normal(B, T, H, P + 1, dtype=dtype), cos, sin)),
        "norm": (wm.residual_rms_norm, (x, x + 1, None, weight, 1e-6)),
        "norm scaled": (wm.residual_rms_norm, (x, x + 1, weight + 1, weight, 1e-6)),
        "gated norm": (wm.gated_rms_norm, (x, x + 1, weight, 1e-6)),
        "topk": (wm.product_key_topk, (normal(B, T, 2, 2, 3, dtype=dtype), normal(2, 4, 2, 3, dtype=dtype), 2)),
        "mix": (wm.expert_mix, (*mix, "silu", False)),
        "mix inside": (wm.expert_mix, (*mix, "gelu", True)),
        "router": (wm.router_topk, (x, 3, False)),
        "router normalized": (wm.router_topk, (x, 3, True)),
        "moe": (wm.moe_mix, moe_call(False, dtype, T + 2)),
        "moe gated": (wm.moe_mix, moe_call(True, dtype, T + 2)),
        "linear": (wm.linear, linear_call((4, 3, 2, 0), dtype, T + 2, bias=False)),
        "linear steps": (wm.linear, linear_call((4, 0, 2, 3), dtype, T + 2)),
        "linear gated": (wm.linear, linear_call((4, 0, 0, 0), dtype, T + 2, gated=True)),
    }


def state_calls(tokens, state, valid, dtype=torch.float32):
    return {
        "scan": (wm.ssd_scan, wm.ssd_scan_, scan_call(tokens, state, valid, False, dtype)),
        "scan rope": (wm.ssd_scan_rope, wm.ssd_scan_rope_, scan_call(tokens, state, valid, True, dtype)),
        "attention": (wm.attention, wm.attention_, attention_call(tokens, state, valid, dtype)),
        "attention rope": (wm.attention_rope, wm.attention_rope_, attention_rope_call(tokens, state, valid, dtype)),
        "keep": (wm.keep_window_attention, wm.keep_window_attention_, keep_call(tokens, state, valid, dtype)),
        "scored": (wm.scored_attention, wm.scored_attention_, scored_call(tokens, state, valid, dtype)),
        "scored binary": (wm.scored_attention, wm.scored_attention_, scored_call(tokens, state, valid, dtype, "binary", H)),
        "scored ratio": (wm.scored_attention, wm.scored_attention_, scored_call(tokens, state, valid, dtype, "ratio", 1)),
        "conv": (wm.causal_conv1d, wm.causal_conv1d_, conv_call(tokens, state, valid, dtype)),
        "selective": (wm.selective_scan, wm.selective_scan_, selective_call(tokens, state, valid, dtype)),
    }


STATE_FORMS = [(T, False, False), (T, True, True), (1, True, False)]


def requiring_grad(call):
    return tuple(v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in call)


@pytest.mark.parametrize("name", list(plain_calls()))
def test_fake_kernel_and_autograd_agree_with_the_plain_op(name):
    op, call = plain_calls()[name]
    torch.library.opcheck(op, requiring_grad(call))


def test_fake_keep_window_attention_makes_no_slots_where_none_are_given():
    with FakeTensorMode():
        fake = wm.keep_window_attention(*keep_call(T, False, False))
    assert [value.shape for value in fake] == [value.shape for value in wm.keep_window_attention(*keep_call(T, False, False))]


def test_fake_kernel_agrees_with_rope_angles():
    for double in (False, True):
        torch.library.opcheck(wm.rope_angles, (torch.arange(6).view(2, 3), 4, 10000.0, double))


@pytest.mark.parametrize("form", [(T, False, False), (T, True, True), (1, False, False), (1, True, False), (1, True, True)])
@pytest.mark.parametrize("name", list(state_calls(*STATE_FORMS[0])))
def test_fake_kernel_and_autograd_agree_with_the_stateful_op(name, form):
    op, in_place, call = state_calls(*form)[name]
    # Tracing a scan with eight symbolic sizes takes ten seconds; the compiled training step below does it once.
    dispatch = "test_aot_dispatch_static" if "scan" in name else "test_aot_dispatch_dynamic"
    torch.library.opcheck(op, requiring_grad(call), test_utils=("test_schema", "test_autograd_registration", "test_faketensor", dispatch))
    if form[1]:
        torch.library.opcheck(in_place, call)


@pytest.mark.parametrize("name", list(plain_calls()))
def test_gradient_of_the_plain_op_is_the_derivative(name):
    op, call = plain_calls(D)[name]
    assert torch.autograd.gradcheck(op, requiring_grad(call), fast_mode=True)


@pytest.mark.parametrize("form", STATE_FORMS)
@pytest.mark.parametrize("name", ["scan", "scan rope", "attention", "attention rope", "scored", "scored binary", "scored ratio"])
def test_gradient_of_the_stateful_op_is_the_derivative(name, form):
    op, _, call = state_calls(*form, D)[name]
    assert torch.autograd.gradcheck(op, requiring_grad(call), fast_mode=True)


def test_gradient_of_one_tensor_in_two_places_is_the_sum_of_both():
    q, k, _ = qkv(T, D)
    apart, shared = requiring_grad((q, k, k)), requiring_grad((q, k))
    both = torch.autograd.grad(wm.attention(*apart, *(None,) * 4)[0].square().sum(), apart[1:])
    (once,) = torch.autograd.grad(wm.attention(*shared, shared[1], *(None,) * 4)[0].square().sum(), shared[1])
    torch.testing.assert_close(once, both[0] + both[1])


@pytest.mark.parametrize("form", STATE_FORMS)
@pytest.mark.parametrize("name", ["conv", "selective"])
def test_gradient_of_a_channelwise_op_is_the_derivative_also_through_one_output(name, form):
    op, _, call = state_calls(*form, D)[name]
    for chosen in (op, lambda *inputs: op(*inputs)[0], lambda *inputs: op(*inputs)[1]):
        assert torch.autograd.gradcheck(chosen, requiring_grad(call), fast_mode=True)


@pytest.mark.parametrize("state", [False, True])
def test_gradient_of_keep_window_attention_is_the_derivative_also_through_the_score(state):
    call = list(keep_call(T, state, False, D))
    if state:
        # Full slots: the -inf scores of empty ones have no finite differences.
        call[6], call[7] = normal(B, K, W, dtype=D), torch.tensor([5, 2]).repeat(B, K, 1)
        call[8] = torch.tensor([6, 6])
    call = requiring_grad(call)
    assert torch.autograd.gradcheck(wm.keep_window_attention, call, fast_mode=True)
    out = wm.keep_window_attention(*call)[0]
    assert float(torch.autograd.grad(out.sum(), call[3])[0].abs().max()) > 0


def test_gradient_of_keep_window_attention_is_finite_beside_empty_slots():
    call = requiring_grad(keep_call(T, True, True, D))
    out, slot_k, _, slot_score, _ = wm.keep_window_attention(*call)
    used = slot_score > -torch.inf
    grads = torch.autograd.grad(
        out[:, 0].sum() + slot_k.sum() + slot_score[used].sum(), [v for v in call if getattr(v, "requires_grad", False)]
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("form", [(T, True, False), (T, True, True), (1, True, False), (1, True, True), (70, True, True)])
@pytest.mark.parametrize("name", list(state_calls(*STATE_FORMS[0])))
def test_in_place_form_equals_the_functional_form(name, form):
    if name.startswith(("attention", "scored")) and form[0] > 9:
        form = (5, *form[1:])
    op, in_place, call = state_calls(*form)[name]
    before = [v.clone() if isinstance(v, torch.Tensor) else v for v in call]
    out, *states = op(*call)
    for kept, given in zip(before, call, strict=True):
        assert kept is given or torch.equal(kept, given)
    assert torch.equal(in_place(*call), out)
    mutated = [argument.name for argument in in_place._opoverload._schema.arguments if argument.is_write]
    names = [argument.name for argument in in_place._opoverload._schema.arguments]
    assert len(mutated) == len(states)
    for name, state in zip(mutated, states, strict=True):
        assert torch.equal(call[names.index(name)], state)


@pytest.mark.parametrize("form", STATE_FORMS)
def test_attention_ops_agree_with_their_references(form):
    valid_row = 0  # the other row may be padding, whose outputs have no meaning
    for op, reference, call in (
        (wm.attention, attention_reference, attention_call(*form, D)),
        (wm.keep_window_attention, keep_window_attention_reference, keep_call(*form, D)),
    ):
        torch.testing.assert_close(op(*call)[0][valid_row], reference(*call)[0][valid_row])


@pytest.mark.parametrize("name", [name for name in wm.__all__ if not name.endswith("_") and name != "numerics"])
def test_op_has_the_arguments_and_defaults_of_its_reference(name):
    reference = getattr(importlib.import_module(f"wm_kernels.{name}.definition"), f"{name}_reference")
    found = getattr(torch.ops.wm, name).default._schema.arguments
    # What a reference takes beyond that is another runtime's ranking, for the oracle.
    expected = list(inspect.signature(reference).parameters.values())[: len(found)]
    assert [argument.name for argument in found] == [argument.name for argument in expected]
    defaults = [argument.default_value if argument.has_default_value() else inspect.Parameter.empty for argument in found]
    assert defaults == [argument.default for argument in expected]


def test_outputs_share_no_memory_with_inputs():
    calls = [(op, call) for op, call in plain_calls().values()]
    for form in STATE_FORMS:
        calls += [(op, call) for op, _, call in state_calls(*form).values()]
    for op, call in calls:
        outputs = op(*call)
        given = {v.untyped_storage().data_ptr() for v in call if isinstance(v, torch.Tensor)}
        for output in [outputs] if isinstance(outputs, torch.Tensor) else outputs:
            assert output.numel() == 0 or output.untyped_storage().data_ptr() not in given
            assert output.is_contiguous()


WRONG = {
    "rope": (
        lambda: wm.rope(normal(2, 3, 4, 4), normal(2, 3, 3), normal(2, 3, 3)),
        "wm::rope: 2F = 6 entries are rotated, expected at most P = 4",
    ),
    "rms": (
        lambda: wm.residual_rms_norm(normal(2, 3), normal(2, 4), None, normal(3), 1e-6),
        "wm::residual_rms_norm: residual_MD has shape (2, 4), expected (M=2, D=3)",
    ),
    "scan groups": (
        lambda: wm.ssd_scan(*scan_call(T, True, False, False)[:3], normal(B, T, 3, N), normal(B, T, 3, N), None, None),
        "wm::ssd_scan: H is 4, expected a multiple of G = 3",
    ),
    "scan dtype": (
        lambda: wm.ssd_scan_(*scan_call(T, True, False, False)[:5], normal(B, H, N, P, dtype=D), None),
        "wm::ssd_scan_: state_BHNP is torch.float64, expected torch.float32",
    ),
    "attention together": (
        lambda: wm.attention(*qkv(T), normal(B, K, 9, P), normal(B, K, 9, P), None, None),
        "wm::attention: got cache_k_BKSP, cache_v_BKSP alone, expected all or none of cache_k_BKSP, cache_v_BKSP, position_B",
    ),
    "attention rope width": (
        lambda: wm.attention_rope(normal(B, T, 30), normal(B, T, F), normal(B, T, F), None, None, None, None, H, K, P),
        "wm::attention_rope: qkv_BTC is 30 wide, expected (H + 2K)·P = 32",
    ),
    "attention rope pairs": (
        lambda: wm.attention_rope(normal(B, T, 32), normal(B, T, 3), normal(B, T, 3), None, None, None, None, H, K, P),
        "wm::attention_rope: 2F = 6 entries are rotated, expected at most P = 4",
    ),
    "keep window": (
        lambda: wm.keep_window_attention(*keep_call(T, False, False)[:-1], 0),
        "wm::keep_window_attention: window is 0, expected at least 1",
    ),
    "topk": (
        lambda: wm.product_key_topk(normal(1, 1, 1, 2, 3), normal(1, 4, 2, 3), 5),
        "wm::product_key_topk: k is 5, expected at most J = 4",
    ),
    "halves": (
        lambda: wm.product_key_topk(normal(1, 1, 1, 3, 3), normal(1, 4, 2, 3), 2),
        "wm::product_key_topk: query_BTR2d has shape (1, 1, 1, 3, 3), expected (B=1, T=1, R=1, 2, d)",
    ),
    "conv state": (
        lambda: wm.causal_conv1d(normal(2, 3, 4), normal(4, 3), None, normal(2, 3, 4), None, "silu"),
        "wm::causal_conv1d: state_BYC holds Y = 3 inputs, expected L - 1 = 2",
    ),
    "conv taps": (
        lambda: wm.causal_conv1d(normal(2, 3, 4), normal(4, 0), None, None, None, "none"),
        "wm::causal_conv1d: L is 0, expected at least 1",
    ),
    "conv activation": (
        lambda: wm.causal_conv1d_(normal(2, 3, 4), normal(4, 3), None, normal(2, 2, 4), None, "relu"),
        "wm::causal_conv1d_: activation is 'relu', expected one of none, silu",
    ),
    "conv valid": (
        lambda: wm.causal_conv1d(normal(2, 3, 4), normal(4, 3), None, None, normal(2), "none"),
        "wm::causal_conv1d: valid_B is torch.float32, expected torch.int64",
    ),
    "gated norm": (
        lambda: wm.gated_rms_norm(normal(2, 3), normal(2, 3, dtype=D), normal(3), 1e-6),
        "wm::gated_rms_norm: z_MC is torch.float64, expected torch.float32",
    ),
    "selective rates": (
        lambda: wm.selective_scan(normal(2, 3, 4), normal(2, 3, 4), normal(4), normal(2, 3, 6), normal(2, 3, 6), None, None),
        "wm::selective_scan: A_CN has shape (4), expected (C=4, N)",
    ),
    "selective state": (
        lambda: wm.selective_scan_(*selective_call(T, False, False)[:5], normal(B, P, N, dtype=D), None),
        "wm::selective_scan_: state_BCN is torch.float64, expected torch.float32",
    ),
    "scored kind": (
        lambda: wm.scored_attention(*scored_call(T, False, False, scoring="soft")),
        "wm::scored_attention: scoring is 'soft', expected one of additive, binary, ratio",
    ),
    "scored ratio": (
        lambda: wm.scored_attention_(*scored_call(T, True, False)[:-1], 1.5),
        "wm::scored_attention_: ratio is 1.5, expected 0 to 1",
    ),
    "scored heads": (
        lambda: wm.scored_attention(*scored_call(T, False, False, A=3)),
        "wm::scored_attention: H is 4, expected a multiple of A = 3",
    ),
    "scored dtype": (
        lambda: wm.scored_attention(*qkv(T), normal(B, T, K, dtype=D), *(None,) * 5, "additive", 0.0),
        "wm::scored_attention: score_BTA is torch.float64, expected torch.float32",
    ),
    "scored together": (
        lambda: wm.scored_attention(*qkv(T), normal(B, T, K), *(normal(B, K, 9, P),) * 2, None, None, None, "additive", 0.0),
        "wm::scored_attention: got cache_k_BKSP, cache_v_BKSP alone, expected all or none of cache_k_BKSP, cache_v_BKSP, cache_score_BAS",
    ),
    "router": (lambda: wm.router_topk(normal(2, 3), 4, True), "wm::router_topk: k is 4, expected at most E = 3, the experts"),
    "moe inner width": (
        lambda: wm.moe_mix(*moe_call(True)[:-1], False),
        "wm::moe_mix: F is 12, expected I for I = 6, gated = False",
    ),
    "moe activation": (
        lambda: wm.moe_mix(*moe_call(True)[:-2], "relu", True),
        "wm::moe_mix: activation is 'relu', expected one of silu, gelu",
    ),
    "linear inputs": (
        lambda: wm.linear(normal(5, 7), *linear_call((4, 3, 2, 3))[1:]),
        "wm::linear: weight_NK has shape (12, 8), expected (N=12, K=7)",
    ),
    "linear bias": (
        lambda: wm.linear(normal(5, 8), normal(12, 8), normal(11), *linear_call((4, 3, 2, 3))[3:]),
        "wm::linear: bias_N has shape (11), expected (N=12)",
    ),
    "linear dtype": (
        lambda: wm.linear(normal(5, 8), normal(12, 8, dtype=D), *linear_call((4, 3, 2, 3))[2:]),
        "wm::linear: weight_NK is torch.float64, expected torch.float32",
    ),
    "linear step bias dtype": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:3], normal(3, dtype=D), 4, 3, 2, 3, False),
        "wm::linear: step_bias_H is torch.float64, expected torch.float32",
    ),
    "linear width below nothing": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:4], 10, -1, 0, 3, False),
        "wm::linear: widths are A 10, B -1, C 0, H 3, expected none below 0",
    ),
    "linear gated parts": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:3], None, 4, 2, 0, 0, True),
        "wm::linear: widths are A 4, B 2, C 0, H 0, expected A alone where it is gated",
    ),
    "linear outputs": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:4], 4, 3, 3, 3, False),
        "wm::linear: widths are A 4, B 3, C 3, H 3, of 13 outputs, expected N = 12",
    ),
    "linear gated outputs": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:3], None, 12, 0, 0, 0, True),
        "wm::linear: widths are A 12, B 0, C 0, H 0, of 24 outputs, expected N = 12",
    ),
    "linear step bias": (
        lambda: wm.linear(*linear_call((4, 3, 2, 3))[:3], normal(2), 4, 3, 2, 3, False),
        "wm::linear: step_bias_H has 2 entries, expected H = 3",
    ),
    "angles": (lambda: wm.rope_angles(torch.zeros(1, 1), 2, 10.0), "wm::rope_angles: position_BT is torch.float32, expected torch.int64"),
}


@pytest.mark.parametrize("name", list(WRONG))
@pytest.mark.parametrize("fake", [False, True])
def test_wrong_arguments_are_refused_in_one_line(name, fake):
    call, message = WRONG[name]
    with torch.device("meta" if fake else "cpu"), pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        call() if not fake else _on_meta(call)
    assert "\n" not in str(caught.value)


def _on_meta(call):
    with torch.device("cpu"), FakeTensorMode():
        call()


def test_training_step_compiled_once_has_the_eager_gradients_at_two_lengths():
    def loss(x, dt, A, b, c, q, k, v, score):
        y, _ = wm.ssd_scan(x, dt, A, b, c, None, None)
        a, *_ = wm.attention(q, k, v, None, None, None, None)
        w, *_ = wm.keep_window_attention(q, k, v, score, None, None, None, None, None, None, 2)
        return (y * a * w).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tokens, stance in ((5, "default"), (7, "fail_on_recompile")):
        call = requiring_grad((*scan_call(tokens, False, False, False, D)[:5], *keep_call(tokens, False, False, D)[:4]))
        for value in call:
            if value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 1)
        expected = torch.autograd.grad(loss(*call), call)
        with torch.compiler.set_stance(stance):
            gradients = torch.autograd.grad(compiled(*call), call)
        for actual, gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual, gradient)


@pytest.mark.parametrize("name", [*plain_calls(), *state_calls(T, True, True)])
def test_64_lengths_make_at_most_two_graphs(name):
    torch._dynamo.reset()
    made = CompileCounter()
    op = plain_calls()[name][0] if name in plain_calls() else state_calls(T, True, True)[name][0]
    compiled = torch.compile(lambda *call: op(*call), backend=made, fullgraph=True)
    for tokens in range(T + 1, T + 65):
        compiled(*(plain_calls(T=tokens)[name][1] if name in plain_calls() else state_calls(tokens, True, True)[name][2]))
    assert made.frame_count <= 2


def test_ops_export_with_dynamic_sizes_and_no_guards():
    class Step(torch.nn.Module):
        def forward(self, x, dt, A, b, c, state, valid, q, k, v, cache_k, cache_v, position):
            y, state = wm.ssd_scan(x, dt, A, b, c, state, valid)
            a, cache_k, cache_v = wm.attention(q, k, v, cache_k, cache_v, position, valid)
            return y + a, state, cache_k, cache_v

    rows, tokens, cells = (torch.export.Dim(name, min=1, max=4096) for name in ("rows", "tokens", "cells"))
    both, row = {0: rows, 1: tokens}, {0: rows}
    shapes = (both, both, None, both, both, row, row, both, both, both, {0: rows, 2: cells}, {0: rows, 2: cells}, row)
    call = (*scan_call(T, True, True, False), *attention_call(T, True, False)[:6])
    program = torch.export.export(Step(), call, dynamic_shapes=shapes)
    short = (*scan_call(1, True, True, False), *attention_call(1, True, False)[:6])
    for actual, expected in zip(program.module()(*short), Step()(*short), strict=True):
        torch.testing.assert_close(actual, expected)


def test_importing_the_package_needs_torch_alone():
    code = "import sys, wm_kernels; sys.exit(any(name in sys.modules for name in ('onnx', 'onnxscript', 'triton', 'wm_graph')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PLAIN = """
import sys
import torch
from wm_kernels._registration import register_kernel

@torch.library.custom_op("plain::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError

@twice.register_fake
def _(x):
    return torch.empty_like(x)

seen = []

@register_kernel(twice, "cpu")
def _(x):
    seen.append(torch.compiler.is_compiling())
    return 2 * x

x = torch.ones(3)
assert torch.equal(twice(x), 2 * x)
assert "torch._dynamo" not in sys.modules

@torch.compile(backend="eager")
def around(x):
    torch._dynamo.graph_break()
    return twice(x) + 1

import torch._dynamo
assert torch.equal(around(x), 2 * x + 1)
assert torch.equal(twice(x), 2 * x)
assert seen == [False] * 3, seen
"""


def test_first_call_of_a_plain_kernel_imports_no_compiler_and_later_ones_are_kept_from_it():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
