"""The Triton kernels of linear layers against the float64 reference, in every regime.

M rows   K inputs   N outputs before gates   A, B, C, H widths of the parts
"""

import pytest
import torch
from torch import Tensor

from triton_support import DEVICE, DTYPES, ON_CUDA, check, needs_triton, random, scattered, wide  # first: it chooses the interpreter
from wm_kernels.linear.definition import linear_reference
from wm_kernels.numerics import numerics

pytestmark = needs_triton

# Of the table's thresholds, on a GPU others than in the interpreter; rows of tiles that are full, that are not, and three, of which two go
# together.
ROWS = (1, 2, 3, 5, 33, 70, *((256, 257) if ON_CUDA else ()))
# K, parts, gated, whether there is a bias and one of step sizes. Tiles have 4 to 32 outputs in the interpreter, blocks 32 or 64 inputs.
SHAPES = {
    "parts that meet inside of tiles": (37, (9, 20, 7, 5), False, False, True),
    "parts and biases": (96, (33, 1, 30, 3), False, True, True),
    "steps without a bias of theirs": (130, (40, 0, 9, 8), False, False, False),
    "steps alone": (64, (0, 0, 0, 21), False, True, True),
    "the middle part alone": (5, (0, 13, 0, 0), False, True, False),
    "one output": (1, (1, 0, 0, 0), False, False, False),
    "one whole": (200, (45, 0, 0, 0), False, False, False),
    "a gate": (37, (21, 0, 0, 0), True, False, False),
    "a gate of biased halves": (128, (33, 0, 0, 0), True, True, False),
}


def made(name: str, M: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor | None], tuple[int, int, int, int], bool]:
    """Tensors, parts, whether they are gated; weights are such that outputs are of order 1."""
    g = torch.Generator().manual_seed(seed)
    K, parts, gated, bias, step_bias = SHAPES[name]
    N = sum(parts) * (2 if gated else 1)
    weight = (random(g, N, K) * K**-0.5).to(dtype)
    biases = (random(g, N, dtype=dtype) if bias else None, random(g, parts[3], dtype=dtype) if step_bias else None)
    return [random(g, M, K, dtype=dtype), weight, *biases], parts, gated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("M", ROWS)
def test_linear(dtype, M, name):
    from wm_kernels.linear.triton_op import linear_triton

    tensors, parts, gated = made(name, M, dtype, seed=M)
    tensors[0] = scattered(tensors[0], 1)
    got, expected = linear_triton(*tensors, parts, gated), linear_reference(*wide(tensors), *parts, gated)
    for actual, truth in zip(got, expected, strict=True):
        check("linear", dtype, actual, truth)
    assert [value.dtype for value in got] == [dtype, dtype, dtype, torch.float32]
    assert all(value.is_contiguous() for value in got)
    assert all(torch.equal(a, b) for a, b in zip(got, linear_triton(*tensors, parts, gated), strict=True))


def test_the_rows_tried_reach_every_regime():
    from wm_kernels.linear.plan import REGIMES, LinearCall, regime
    from wm_kernels.triton_launch import architecture

    for dtype in DTYPES:
        calls = [LinearCall(architecture(DEVICE), dtype, M, 64, (8, 0, 0, 0), False, False, False) for M in ROWS]
        assert {regime(call) for call in calls} == set(REGIMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_exact_numerics_give_a_row_its_own_bits_among_any_others(dtype, name):
    from wm_kernels.linear.triton_op import linear_triton

    M = 300 if ON_CUDA else 9
    (x, *rest), parts, gated = made(name, M, dtype)
    with numerics("exact"):
        whole = linear_triton(x, *rest, parts, gated)
        for actual, truth in zip(whole, linear_reference(*wide((x, *rest)), *parts, gated), strict=True):
            check("linear", dtype, actual, truth)
        for first, count in ((0, 1), (1, 2), (3, M - 4), (M - 1, 1)):
            some = linear_triton(x[first : first + count], *rest, parts, gated)
            for rows, expected in zip(some, whole, strict=True):
                assert torch.equal(rows, expected[first : first + count]), f"{count} rows from {first} on"


@pytest.mark.parametrize("M", ROWS)
def test_step_sizes_from_far_below_zero_to_far_above(M):
    from wm_kernels.linear.triton_op import linear_triton

    step_H = torch.tensor([-1000.0, -80.0, -17.0, -16.0, -1.0, 0.0, 1.0, 19.9, 20.1, 40.0, 1000.0], device=DEVICE)
    x, weight = torch.ones((M, 1), device=DEVICE), torch.zeros((len(step_H), 1), device=DEVICE)
    *_, dt = linear_triton(x, weight, None, step_H, (0, 0, 0, len(step_H)), False)
    # Of themselves: a small step is exp of what it is of, whose last bits count too.
    torch.testing.assert_close(
        dt.double(), torch.logaddexp(step_H.double(), torch.zeros((), device=DEVICE)).expand(M, -1), rtol=2e-6, atol=1e-37
    )


@pytest.mark.parametrize("M", ROWS)
def test_nothing_is_read_past_the_inputs_and_nothing_written_past_the_outputs(M):
    """NaNs lie around what is read, and stay around what is written."""
    from wm_kernels.linear.plan import LinearCall, plan
    from wm_kernels.triton_launch import architecture, run

    (x, weight, bias, step_bias), parts, gated = made("parts and biases", M, torch.float32)
    names = ("x_MK", "weight_NK", "bias_N", "step_bias_H", "a_MA", "b_MB", "c_MC", "dt_MH")
    values = [x, weight, bias, step_bias, *(torch.full((M, width), torch.nan, device=DEVICE) for width in parts)]
    held = {name: torch.full((value.numel() + 128,), torch.nan, device=DEVICE) for name, value in zip(names, values, strict=True)}
    tensors = {name: held[name][64 : 64 + value.numel()].view(value.shape).copy_(value) for name, value in zip(names, values, strict=True)}
    run(plan(LinearCall(architecture(DEVICE), torch.float32, M, x.shape[1], parts, gated, True, True)), tensors)
    for name, truth in zip(names[4:], linear_reference(*wide(values[:4]), *parts, gated), strict=True):
        check("linear", torch.float32, tensors[name], truth)
        assert held[name][:64].isnan().all()
        assert held[name][-64:].isnan().all()


def test_linear_has_no_grid_that_is_too_large_for_a_device():
    from wm_kernels.linear.plan import LinearCall, plan

    for M, exact in ((1, False), (65_535, True), (65_536, True), (600_000, True), (2**24, False)):
        for N in (1, 32_768, 2**20):
            call = LinearCall("sm_90", torch.bfloat16, M, 64, (N, 0, 0, 0), False, False, False, exact)
            for launch in plan(call).launches:
                x, y, z = launch.blocks
                assert 0 < x < 2**31
                assert 0 < max(y, z) < 2**16
                assert x * y * z * launch.constants.get("ROWS", launch.constants.get("BLOCK_M")) * launch.constants["BLOCK_N"] >= M * N


def test_exact_rows_past_the_second_axis_of_a_grid_are_computed(monkeypatch):
    from wm_kernels.linear import plan as plans
    from wm_kernels.linear import triton_op

    (x, *rest), parts, gated = made("a gate", 11, torch.float32)
    with numerics("exact"):
        expected = triton_op.linear_triton(x, *rest, parts, gated)[0]
        monkeypatch.setattr(plans, "DOWN", 4)
        monkeypatch.setattr(triton_op, "plan", plans.plan.__wrapped__)
        monkeypatch.setattr(triton_op, "_known", {})
        assert torch.equal(triton_op.linear_triton(x, *rest, parts, gated)[0], expected)
