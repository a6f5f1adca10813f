"""The Triton kernels of norms, convolution, scan and rotation against the float64 reference. B rows, T tokens, C channels."""

import pytest
import torch

from triton_support import DEVICE, DTYPES, check, needs_triton, random, scattered, wide  # first: it chooses the interpreter
from wm_kernels.causal_conv1d.definition import causal_conv1d_reference
from wm_kernels.gated_rms_norm.definition import gated_rms_norm_reference
from wm_kernels.numerics import numerics
from wm_kernels.residual_rms_norm.definition import residual_rms_norm_reference
from wm_kernels.rope.definition import rope_reference
from wm_kernels.rope_angles.definition import rope_angles_reference
from wm_kernels.selective_scan.definition import selective_scan_reference

pytestmark = needs_triton


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "D", "scale"), [(1, 24, True), (13, 100, False), (6, 20000, True)])
def test_residual_rms_norm(dtype, M, D, scale):
    from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton

    g = seeded()
    x, residual = (scattered(random(g, M, D, dtype=dtype), seed) for seed in (1, 2))
    scale_D, weight = random(g, D, dtype=dtype) if scale else None, random(g, D, dtype=dtype)
    got = residual_rms_norm_triton(x, residual, scale_D, weight, 1e-5)
    expected = residual_rms_norm_reference(*wide((x, residual, scale_D, weight)), 1e-5)
    for actual, truth in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        check("residual_rms_norm", dtype, actual, truth)
    assert all(torch.equal(a, b) for a, b in zip(got, residual_rms_norm_triton(x, residual, scale_D, weight, 1e-5), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "C"), [(1, 24), (13, 100), (2, 17000)])
def test_gated_rms_norm(dtype, M, C):
    from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton

    g = seeded()
    y, z = (scattered(4 * random(g, M, C, dtype=dtype), seed) for seed in (1, 2))
    weight = random(g, C)  # a float32 weight beside half-precision tensors
    got = gated_rms_norm_triton(y, z, weight, 1e-5)
    check("gated_rms_norm", dtype, got, gated_rms_norm_reference(*wide((y, z, weight)), 1e-5))
    assert torch.equal(got, gated_rms_norm_triton(y, z, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 2, 15, 16, 17, 37])
@pytest.mark.parametrize(("L", "bias", "activation"), [(4, True, "silu"), (1, False, "none"), (3, False, "silu")])
def test_causal_conv1d(dtype, T, L, bias, activation):
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

    g, B, C = seeded(), 3, 21
    x = scattered(random(g, B, T, C, dtype=dtype), T) if T else random(g, B, T, C, dtype=dtype)
    weight, bias_C = random(g, C, L, dtype=dtype), random(g, C, dtype=dtype) if bias else None
    for state in (None, scattered(random(g, B, L - 1, C), 3) if L > 1 else random(g, B, 0, C)):
        for valid in (None, torch.tensor([T, 0, max(T - 1, 0)], device=DEVICE)):
            kept = None if state is None else state.clone()
            y, after = causal_conv1d_triton(x, weight, bias_C, state, valid, activation)
            expected_y, expected_after = causal_conv1d_reference(*wide((x, weight, bias_C, state, valid)), activation)
            check("causal_conv1d", dtype, y, expected_y)
            assert torch.equal(after.double(), expected_after)
            if state is not None:
                assert torch.equal(state, kept)
                again, same = causal_conv1d_triton(x, weight, bias_C, state, valid, activation, state)
                assert same is state
                assert torch.equal(again, y)
                assert torch.equal(state, after)
                state.copy_(kept)


def scan_inputs(B, T, C, N, dtype, steps=None):
    g = seeded(T)
    x = scattered(random(g, B, T, C, dtype=dtype), 1)
    dt = torch.rand((B, T, C), generator=g).to(DEVICE) if steps is None else torch.full((B, T, C), float(steps), device=DEVICE)
    A = -torch.rand((C, N), generator=g).to(DEVICE) * 4 - 0.01
    b, c = (scattered(random(g, B, T, N, dtype=dtype), seed) for seed in (2, 3))
    return x, dt, A, b, c, scattered(random(g, B, C, N), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "C"), [(3, 1, 18), (2, 23, 10), (3, 24, 10), (2, 25, 18), (2, 67, 10), (1, 97, 10)])
def test_selective_scan(dtype, B, T, C):
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    x, dt, A, b, c, state = scan_inputs(B, T, C, 5, dtype)
    for before in (None, state):
        for valid in (None, torch.tensor([T, 0, T // 2], device=DEVICE)[-B:]):
            if T > 25 and (before is None) != (valid is None):
                continue
            y, after = selective_scan_triton(x, dt, A, b, c, before, valid)
            expected_y, expected_after = selective_scan_reference(*wide((x, dt, A, b, c, before, valid)))
            assert y.isfinite().all()
            counts = [T] * B if valid is None else valid.tolist()
            # Padding has no meaning; the reference's is another.
            for row, count in enumerate(counts):
                check("selective_scan", dtype, y[row, :count], expected_y[row, :count])
            check("selective_scan", dtype, after, expected_after)
    kept = state.clone()
    again, same = selective_scan_triton(x, dt, A, b, c, state, valid, state)
    assert same is state
    assert torch.equal(again, y)
    assert torch.equal(state, after)
    state.copy_(kept)


def test_selective_scan_reads_no_padding():
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    for T in (1, 70):
        x, dt, A, b, c, state = scan_inputs(2, T, 10, 5, torch.float32)
        for value in (x, dt, b, c):
            value[0, T // 2 :] = torch.nan
        valid = torch.tensor([T // 2, T], device=DEVICE)
        y, after = selective_scan_triton(x, dt, A, b, c, state, valid)
        _, expected = selective_scan_reference(*wide((*(value.nan_to_num() for value in (x, dt)), A, b.nan_to_num(), c, state, valid)))
        assert y.isfinite().all()
        check("selective_scan", torch.float32, after, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_scan_with_exact_numerics_gives_the_same_bits_for_every_split(dtype):
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    T = 19
    x, dt, A, b, c, state = scan_inputs(2, T, 10, 5, dtype)
    with numerics("exact"):
        y, final = selective_scan_triton(x, dt, A, b, c, state, None)
        check("selective_scan", dtype, y, selective_scan_reference(*wide((x, dt, A, b, c, state, None)))[0])
        for sizes in ([1] * T, [5, 1, 13]):
            now, parts = state.clone(), []
            for x_, dt_, b_, c_ in zip(*(value.split(sizes, 1) for value in (x, dt, b, c)), strict=True):
                parts.append(selective_scan_triton(x_, dt_, A, b_, c_, now, None, now)[0])
            assert torch.equal(torch.cat(parts, 1), y)
            assert torch.equal(now, final)


def test_selective_scan_has_no_grid_that_is_too_large_for_a_device():
    from wm_kernels.selective_scan.plan import plan

    for B, T in ((70_000, 1), (70_000, 100), (1, 10**7)):
        made = plan(B, T, 16, 4, torch.float32, (True, True), (16,) * 4 + (4,) * 5, (64, 4, 64, 4), "sm_90")
        for launch in made.launches:
            assert launch.grid[0] < 2**31
            assert all(size < 2**16 for size in launch.grid[1:])


@pytest.mark.parametrize("steps", [0, 40])
def test_selective_scan_at_the_ends_of_its_steps(steps):
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    x, dt, A, b, c, state = scan_inputs(1, 70, 16, 4, torch.float32, steps)
    got, expected = selective_scan_triton(x, dt, A, b, c, state, None), selective_scan_reference(*wide((x, dt, A, b, c, state, None)))
    for actual, truth in zip(got, expected, strict=True):
        check("selective_scan", torch.float32, actual, truth)


@pytest.mark.parametrize("pairs", [1, 10, 32])
@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "dynamic"])
def test_rope_angles(scaling, pairs):
    from wm_kernels.rope_angles.triton_op import rope_angles_triton

    position = torch.tensor([[0, 1, 77, 4095, 100_003], [2**24 - 1, 2**24, 8, 131_072, 5]], device=DEVICE)
    numbers = (scaling, 8.0, 4096, 1.0, 4.0)
    length = torch.tensor([100_004, 17], device=DEVICE) if scaling == "dynamic" else None
    expected = rope_angles_reference(position, pairs, 10000.0, True, length, *numbers)
    for given in (position, position.repeat_interleave(2, 1)[:, ::2]):  # in strides too
        got = rope_angles_triton(given, pairs, 10000.0, length, *numbers)
        for actual, truth in zip(got, expected, strict=True):
            check("rope_angles", torch.float32, actual, truth)
        again = rope_angles_triton(given, pairs, 10000.0, length, *numbers)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "H", "P", "F"), [(2, 7, 3, 20, 8), (1, 1, 5, 16, 8), (3, 5, 2, 6, 1)])
def test_rope(dtype, B, T, H, P, F):
    from wm_kernels.rope.triton_op import rope_triton

    g = seeded()
    x, cos, sin = scattered(random(g, B, T, H, P, dtype=dtype), 5), scattered(random(g, B, T, F), 6), random(g, B, T, F)
    y = rope_triton(x, cos, sin)
    check("rope", dtype, y, rope_reference(*wide((x, cos, sin))))
    assert torch.equal(y, rope_triton(x, cos, sin))
    assert torch.equal(y[..., 2 * F :], x[..., 2 * F :])
