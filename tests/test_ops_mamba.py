"""The ops of Mamba layers: against loops in float64, against transformers' own, in parts, and within their memory.

B rows, T tokens, C channels, L taps, N state.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2

import oracles
import wm_kernels as wm
from onnx_cases import session_of_program
from wm_graph.tolerances import op_limit

B, T, C, L, N = 2, 9, 12, 4, 8  # of the comparisons with transformers


def near(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near_where_valid(actual, expected, valid):
    assert actual.isfinite().all()
    for b in range(len(actual)):
        count = actual.shape[1] if valid is None else int(valid[b])
        near(actual[b, :count], expected[b, :count])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def conv_inputs(T, seed=0, B=2, C=5, L=4):
    g = generator(seed)
    shapes = (B, T, C), (C, L), (C,), (B, L - 1, C)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("L", [1, 2, 4])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_causal_conv1d_equals_the_loop(T, L, activation):
    x, weight, bias, state = conv_inputs(T, L=L)
    for initial in (None, state):
        for valid in (None, torch.tensor([T, T // 2]), torch.tensor([0, T - 1])):
            for added in (None, bias):
                y, final = wm.causal_conv1d(x, weight, added, initial, valid, activation)
                expected_y, expected_final = oracles.causal_conv1d(x, weight, added, initial, valid, activation)
                near_where_valid(y, expected_y, valid)
                assert torch.equal(final, expected_final)


@settings(max_examples=15, deadline=None)
@given(T=st.integers(2, 12), cut=st.integers(1, 11), L=st.integers(1, 6), seed=st.integers(0, 99))
def test_causal_conv1d_of_two_parts_equals_the_whole(T, cut, L, seed):
    cut = min(cut, T - 1)
    x, weight, bias, state = conv_inputs(T, seed, L=L)
    whole = wm.causal_conv1d(x, weight, bias, state, None, "silu")
    y0, middle = wm.causal_conv1d(x[:, :cut], weight, bias, state, None, "silu")
    y1, final = wm.causal_conv1d(x[:, cut:], weight, bias, middle, None, "silu")
    near(torch.cat([y0, y1], 1), whole[0])
    assert torch.equal(final, whole[1])


def test_causal_conv1d_of_a_padded_part_then_the_rest_equals_the_whole():
    x, weight, bias, state = conv_inputs(9)
    whole = wm.causal_conv1d(x, weight, bias, state, None, "silu")
    for count in range(6):
        y0, middle = wm.causal_conv1d(x[:, :5], weight, bias, state, torch.tensor([count, count]), "silu")
        y1, final = wm.causal_conv1d(x[:, count:], weight, bias, middle, None, "silu")
        near(torch.cat([y0[:, :count], y1], 1), whole[0])
        assert torch.equal(final, whole[1])


def selective_inputs(T, seed=0, B=2, C=3, N=4):
    g = generator(seed)
    x, b, c, state = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((B, T, C), (B, T, N), (B, T, N), (B, C, N)))
    dt = torch.rand((B, T, C), generator=g, dtype=torch.float64)
    A = -3 * torch.rand((C, N), generator=g, dtype=torch.float64) - 0.01
    return x, dt, A, b, c, state


@pytest.mark.parametrize("T", [1, 2, 9, 65])
@pytest.mark.parametrize("initial", [False, True])
def test_selective_scan_equals_the_recurrence(T, initial):
    *call, state = selective_inputs(T)
    state = state if initial else None
    for valid in (None, torch.tensor([T, T // 2]), torch.tensor([0, T - 1])):
        y, final = wm.selective_scan(*call, state, valid)
        expected_y, expected_final = oracles.selective_scan(*call, state, valid)
        near_where_valid(y, expected_y, valid)
        near(final, expected_final)


def test_selective_scan_in_small_spans_is_the_same(monkeypatch):
    call = (*selective_inputs(20), torch.tensor([20, 13]))
    wanted = [v.clone().requires_grad_() for v in call[:6]]

    def run():
        outputs = wm.selective_scan(*wanted, call[6])
        return outputs, torch.autograd.grad([out.square().sum() for out in outputs], wanted)

    whole = run()
    monkeypatch.setattr(sys.modules["wm_kernels.selective_scan.definition"], "SPAN_ELEMENTS", 3 * 2 * 3 * 4)
    for actual, expected in zip(run(), whole, strict=True):
        for a, e in zip(actual, expected, strict=True):
            near(a, e)


def test_selective_scan_keeps_no_states_of_all_tokens():
    B, T, C, N = 1, 512, 256, 16
    x, dt, A, b, c, _ = (v.float() for v in selective_inputs(T, B=B, C=C, N=N))
    call = [v.requires_grad_() for v in (x, dt, A, b, c)]
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(v.untyped_storage().nbytes() for v in tree_leaves(out) if isinstance(v, torch.Tensor))
            return out

    definition = sys.modules["wm_kernels.selective_scan.definition"]
    with Record():
        definition.selective_scan_reference(*(v.detach() for v in call), None, None)
        definition.selective_scan_backward._init_fn(x.detach(), x.new_zeros((B, C, N)), *(v.detach() for v in call), None, None)
    assert max(sizes) <= 4 * definition.SPAN_ELEMENTS < 4 * B * T * C * N


def test_selective_scan_of_an_empty_row_returns_its_state_bit_for_bit():
    for T in (1, 9):
        *call, state = selective_inputs(T)
        _, final = wm.selective_scan(*call, state, torch.tensor([0, T]))
        assert torch.equal(final[0], state[0])


@settings(max_examples=12, deadline=None)
@given(T=st.integers(2, 20), cut=st.integers(1, 19), seed=st.integers(0, 99))
def test_selective_scan_of_two_parts_equals_the_whole(T, cut, seed):
    cut = min(cut, T - 1)
    x, dt, A, b, c, state = selective_inputs(T, seed)
    whole = wm.selective_scan(x, dt, A, b, c, state, None)
    y0, middle = wm.selective_scan(*(v[:, :cut] for v in (x, dt)), A, *(v[:, :cut] for v in (b, c)), state, None)
    y1, final = wm.selective_scan(*(v[:, cut:] for v in (x, dt)), A, *(v[:, cut:] for v in (b, c)), middle, None)
    near(torch.cat([y0, y1], 1), whole[0])
    near(final, whole[1])


def test_gated_rms_norm_equals_the_formula():
    y, z = torch.randn((2, 5, 8), generator=generator(0), dtype=torch.float64)
    weight = torch.rand(8, generator=generator(1), dtype=torch.float64)
    near(wm.gated_rms_norm(y, z, weight, 1e-5), oracles.gated_rms_norm(y, z, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_of_convolution_and_selective_scan_give_their_dtype_and_float32_states(dtype):
    x, weight, bias, _ = (v.to(dtype) for v in conv_inputs(5))
    y, state = wm.causal_conv1d(x, weight, bias, None, None, "silu")
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact, _ = oracles.causal_conv1d(x, weight, bias, None, None, "silu")
    assert float((y.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    x, dt, A, b, c, _ = (v.float() for v in selective_inputs(5))
    x, b, c = x.to(dtype), b.to(dtype), c.to(dtype)
    y, state = wm.selective_scan(x, dt, A, b, c, None, None)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact, _ = oracles.selective_scan(x, dt, A, b, c, None, None)
    assert float((y.double() - exact).abs().max()) <= 2 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_training_step_compiled_once_has_the_eager_gradients_at_two_lengths():
    def loss(x, weight, bias, dt, A, b, c, norm_C):
        u, _ = wm.causal_conv1d(x, weight, bias, None, None, "silu")
        y, _ = wm.selective_scan(u, dt, A, b, c, None, None)
        return wm.gated_rms_norm(y.flatten(0, 1), x.flatten(0, 1), norm_C, 1e-6).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tokens, stance in ((5, "default"), (7, "fail_on_recompile")):
        _, dt, A, b, c, _ = selective_inputs(tokens)
        call = [
            value.requires_grad_()
            for value in (*conv_inputs(tokens, C=3)[:3], dt, A, b, c, torch.rand(3, generator=generator(1), dtype=torch.float64))
        ]
        for value in call:
            if value.dim() == 3:
                torch._dynamo.maybe_mark_dynamic(value, 1)
        expected = torch.autograd.grad(loss(*call), call)
        with torch.compiler.set_stance(stance):
            gradients = torch.autograd.grad(compiled(*call), call)
        for actual, gradient in zip(gradients, expected, strict=True):
            near(actual, gradient)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def agree(actual, expected, op):
    limit = op_limit(op, "float32", "eager").relative * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * limit)  # both sides round


class Mixer(torch.nn.Module):
    """The three ops in a row, as a layer would use them."""

    def forward(self, x, weight, bias, dt, A, b, c, norm_C, conv_BYC, state_BCN, valid):
        u, conv_BYC = wm.causal_conv1d(x, weight, bias, conv_BYC, valid, "silu")
        y, state_BCN = wm.selective_scan(u, dt, A, b, c, state_BCN, valid)
        out_MC = wm.gated_rms_norm(y.flatten(0, 1), x.flatten(0, 1), norm_C, 1e-5)
        return out_MC.view_as(x), conv_BYC, state_BCN


def mixer_call(tokens, seed=0):
    x, weight, bias, conv = conv_inputs(tokens, seed, C=3)
    _, dt, A, b, c, state = selective_inputs(tokens, seed)
    norm = torch.rand(3, generator=generator(seed), dtype=torch.float64)
    valid = torch.tensor([tokens, tokens - 1])
    return *(value.float() for value in (x, weight, bias, dt, A, b, c, norm, conv, state)), valid


@pytest.mark.parametrize("flavour", ["portable", "ort"])
def test_onnx_file_of_a_mixer_keeps_its_states_over_calls(flavour):
    rows, tokens = (torch.export.Dim(name, min=1, max=4096) for name in ("rows", "tokens"))
    both, row = {0: rows, 1: tokens}, {0: rows}
    shapes = (both, None, None, both, None, both, both, None, row, row, row)
    program = torch.export.export(Mixer(), mixer_call(5), dynamic_shapes=shapes)
    run = session_of_program(program, flavour)
    names = [value.name for value in run.get_inputs()]
    states = mixer_call(1)[8:10]
    theirs = [state.numpy() for state in states]
    for seed, tokens in enumerate((5, 1, 1, 3)):
        *call, _, _, valid = mixer_call(tokens, seed)
        expected, *states = Mixer()(*call, *states, valid)
        feeds = [value.numpy() for value in call] + theirs + [valid.numpy()]
        found, *theirs = run.run(None, dict(zip(names, feeds, strict=True)))
        near(torch.from_numpy(found)[0], expected[0], 1e-5)
        for state, other in zip(states, theirs, strict=True):
            near(torch.from_numpy(other), state, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_gated_rms_norm_is_mamba_rms_norm_gated_bit_for_bit(dtype):
    module = mamba2.MambaRMSNormGated(C, eps=1e-5)
    module.weight.copy_(draw(C))
    module.to(dtype)
    y_MC, z_MC = draw(B * T, C).to(dtype), draw(B * T, C, seed=1).to(dtype)
    assert torch.equal(wm.gated_rms_norm(y_MC, z_MC, module.weight, 1e-5), module(y_MC, z_MC))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_causal_conv1d_is_that_of_transformers_in_prefill_and_in_every_step(activation):
    x_BTC, weight_CL, bias_C = draw(B, T, C), draw(C, L), draw(C, seed=1)
    theirs = None if activation == "none" else activation
    y_BTC, state_BYC = wm.causal_conv1d(x_BTC, weight_CL, bias_C, None, None, activation)
    agree(y_BTC, mamba2.causal_conv1d_fn(x_BTC.transpose(1, 2), weight_CL, bias_C, theirs).transpose(1, 2), "causal_conv1d")
    their_state_BCL = x_BTC[:, -L:].transpose(1, 2).contiguous()  # one more input than the filter needs
    for step in range(3):
        x_B1C = draw(B, 1, C, seed=step + 2)
        y_B1C, state_BYC = wm.causal_conv1d(x_B1C, weight_CL, bias_C, state_BYC, None, activation)
        expected = mamba2.causal_conv1d_update(x_B1C.transpose(1, 2), their_state_BCL, weight_CL, bias_C, theirs)
        agree(y_B1C, expected.transpose(1, 2), "causal_conv1d")
        assert torch.equal(state_BYC.transpose(1, 2), their_state_BCL[:, :, 1:])


def test_selective_scan_is_that_of_jamba_in_prefill_and_in_every_step():
    x_BTC, dt_BTC, A_CN = draw(B, T, C), draw(B, T, C, seed=1).abs(), -draw(C, N).exp()
    B_BTN, C_BTN = draw(B, T, N), draw(B, T, N, seed=1)
    y_BTC, state_BCN = wm.selective_scan(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, None, None)
    turned = (v.transpose(1, 2) for v in (B_BTN, C_BTN))
    expected_y_BCT, expected_state = jamba.mamba_selective_scan(
        x_BTC.transpose(1, 2), dt_BTC.transpose(1, 2), A_CN, *turned, return_last_state=True
    )
    agree(y_BTC, expected_y_BCT.transpose(1, 2), "selective_scan")
    agree(state_BCN, expected_state, "selective_scan")
    for step in range(3):
        x_B1C, dt_B1C = draw(B, 1, C, seed=step + 2), draw(B, 1, C, seed=step + 5).abs()
        B_B1N, C_B1N = draw(B, 1, N, seed=step + 2), draw(B, 1, N, seed=step + 5)
        y_B1C, state_BCN = wm.selective_scan(x_B1C, dt_B1C, A_CN, B_B1N, C_B1N, state_BCN, None)
        # Their state is written in place.
        expected_y_BC = jamba.mamba_selective_state_update(expected_state, x_B1C[:, 0], dt_B1C[:, 0], A_CN, B_B1N[:, 0], C_B1N[:, 0])
        agree(y_B1C[:, 0], expected_y_BC, "selective_scan")
        agree(state_BCN, expected_state, "selective_scan")
