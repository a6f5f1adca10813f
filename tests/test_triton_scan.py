"""The Triton scans against the float64 references: on a GPU where there is one, else in Triton's interpreter.

B rows   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs   K segments
"""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF, op_limit

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# Kernels are made for the interpreter or not when they are imported.
from wm_kernels.numerics import numerics  # noqa: E402
from wm_kernels.ssd_scan import plan as plans  # noqa: E402
from wm_kernels.ssd_scan import ssd_scan_reference  # noqa: E402
from wm_kernels.ssd_scan.triton_op import describe, ssd_scan_triton  # noqa: E402
from wm_kernels.ssd_scan_rope import ssd_scan_rope_reference  # noqa: E402
from wm_kernels.triton_launch import run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # Triton's interpreter, numpy 2
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter's products of bfloat16 are wrong.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.float16)
Q = 64 if CUDA else 16
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def inputs(T, dtype=torch.float32, B=2, H=2, P=20, G=1, N=24, F=5, seed=0):
    """x, dt, A, B, C, then state, cos and sin; a tenth of the step sizes are 0, a twentieth 40."""
    g = torch.Generator().manual_seed(seed)
    x, b, c = (torch.randn(shape, generator=g).to(dtype) for shape in ((B, T, H, P), (B, T, G, N), (B, T, G, N)))
    dt = torch.nn.functional.softplus(2 * torch.randn((B, T, H), generator=g))
    kind = torch.rand((B, T, H), generator=g)
    dt = dt.masked_fill(kind < 0.1, 0.0).masked_fill(kind > 0.95, 40.0)
    A = -torch.linspace(0.1, 8, H)
    state = torch.randn((B, H, N, P), generator=g)
    angle = 6 * torch.rand((B, T, F), generator=g)
    return tuple(value.to(DEVICE) for value in (x, dt, A, b, c, state, angle.cos(), angle.sin()))


def oracle(x, dt, A, b, c, state, valid, cos=None, sin=None):
    x, dt, A, b, c, state, cos, sin = (None if value is None else value.double() for value in (x, dt, A, b, c, state, cos, sin))
    if cos is None:
        return ssd_scan_reference(x, dt, A, b, c, state, valid)
    return ssd_scan_rope_reference(x, dt, A, b, c, cos, sin, state, valid)


def assert_within_limits(op, dtype, found, expected, valid=None):
    """y within the op's limits; the state within those of the model's dtype, to which the products that add to it round their operands."""
    limit, u = op_limit(op, NAMES[dtype], "eager"), UNIT_ROUNDOFF[NAMES[dtype]]
    y, state = found
    expected_y, expected_state = expected
    assert y.isfinite().all()
    if valid is not None:
        live = torch.arange(y.shape[1], device=y.device) < valid[:, None]
        y, expected_y = y[live], expected_y[live]
    for value, reference in ((y, expected_y), (state, expected_state)):
        if reference.numel():
            error = value.double() - reference
            assert error.abs().max() <= limit.relative * reference.abs().max()
            assert error.square().mean().sqrt() <= limit.R * FLOOR_ULPS * u * reference.square().mean().sqrt() or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, Q - 1, Q, Q + 1, 2 * Q + 9])  # the last is a prime
def test_triton_scans_equal_the_reference(T, dtype):
    x, dt, A, b, c, state, cos, sin = inputs(T, dtype, seed=T)
    valid = torch.tensor([T, T // 3], device=DEVICE)
    assert_within_limits("ssd_scan", dtype, ssd_scan_triton(x, dt, A, b, c, None, None), oracle(x, dt, A, b, c, None, None))
    found = ssd_scan_triton(x, dt, A, b, c, state, valid, cos, sin)
    assert_within_limits("ssd_scan_rope", dtype, found, oracle(x, dt, A, b, c, state, valid, cos, sin), valid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "K", "forgets"),
    [("sweep", 1, True), ("fold", 2, True), ("carry", 3, True), *((name, K, False) for name in ("fold", "carry") for K in (3, 4))],
)
@pytest.mark.parametrize("has_state", [False, True])
def test_every_regime_equals_the_reference(name, K, forgets, has_state, dtype):
    """Segments are of several chunks; where nothing is forgotten, what each of them leaves matters in all that follow."""
    T, F = 2 * K * Q - 7, 12 if has_state else 0
    x, dt, A, b, c, state, cos, sin = inputs(T, dtype, F=max(F, 1), seed=K)
    dt, state = dt if forgets else dt / 100, state if has_state else None
    valid = torch.tensor([T, Q + 3], device=DEVICE)
    angles = (cos, sin) if F else ()
    call = call_of(x, dt, A, b, c, state, valid, *angles)
    plan = plans.chunked(call, name, plans.values(call, "sweep"), K)
    y = torch.full_like(x, torch.nan)
    out = torch.full((*x.shape[::2], 24, 20), torch.nan, device=DEVICE) if state is None else state.clone()  # in place where it can be
    tensors = {"x": x, "dt": dt, "A": A, "B": b, "C": c, "valid": valid, "state": None if state is None else out, "y": y, "out": out}
    tensors |= dict(zip(("cos", "sin"), angles, strict=False))
    run(plan, {key: value for key, value in tensors.items() if value is not None})
    assert len(plan.launches) == {"sweep": 2, "fold": 3, "carry": 4}[name]
    assert K == 1 or plan.scratch["slot"].shape[1] == K
    assert_within_limits("ssd_scan", dtype, (y, out), oracle(x, dt, A, b, c, state, valid, *angles), valid)


def call_of(x, dt, A, b, c, state, valid, cos=None, sin=None):
    """The call of contiguous tensors, as the wrapper describes it."""
    named = {"x": x, "dt": dt, "A": A, "B": b, "C": c, "cos": cos, "sin": sin, "valid": valid, "state": state}
    return describe(
        {key: value for key, value in named.items() if value is not None}, x.new_empty((*x.shape[::2], *b.shape[3:], *x.shape[3:]))
    )


@pytest.mark.parametrize("T", [1, Q + 1])
def test_strides_and_offsets_are_honoured(T):
    x, dt, A, b, c, state, cos, sin = inputs(T, H=2, G=2, F=12)
    valid = torch.tensor([T, max(T - 2, 0)], device=DEVICE)
    expected = oracle(x, dt, A, b, c, state, valid, cos, sin)
    # Slices of one projection, as models give them; heads before tokens; a state whose rows are apart; a transposed last axis.
    merged = torch.cat([v.flatten(2) for v in (c, b, x)], -1)
    c2, b2, x2 = (part.unflatten(2, (2, -1)) for part in merged.split([48, 48, 40], -1))
    dt2 = dt.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 2, 24, 33), torch.nan, device=DEVICE)
    wide[..., 7:27] = state
    cos2 = cos.transpose(1, 2).contiguous().transpose(1, 2)
    found = ssd_scan_triton(x2, dt2, A.repeat_interleave(3)[::3], b2, c2, wide[..., 7:27], valid, cos2, sin)
    assert_within_limits("ssd_scan_rope", torch.float32, found, expected, valid)
    y, given = ssd_scan_triton(x2, dt2, A, b2, c2, wide[..., 7:27], valid, cos, sin, in_place=True)
    assert_within_limits("ssd_scan_rope", torch.float32, (y, wide[..., 7:27]), expected, valid)
    assert given.data_ptr() == wide[..., 7:27].data_ptr()
    assert wide[..., :7].isnan().all()
    assert wide[..., 27:].isnan().all()
    turned = state.transpose(2, 3).contiguous().transpose(2, 3)
    y, given = ssd_scan_triton(x, dt, A, b, c, turned, valid, cos, sin, in_place=True)
    assert given is turned
    assert_within_limits("ssd_scan_rope", torch.float32, (y, turned), expected, valid)


def test_an_empty_row_keeps_its_state_bit_for_bit_whatever_its_padding():
    for T in (1, Q + 3):
        x, dt, A, b, c, state, cos, sin = inputs(T)
        for value in (x, dt, b, c):
            value[0] = torch.nan
        valid = torch.tensor([0, T], device=DEVICE)
        y, final = ssd_scan_triton(x, dt, A, b, c, state, valid, cos, sin)
        assert torch.equal(final[0], state[0])
        assert y.isfinite().all()


def test_a_decay_that_forgets_everything_keeps_the_small_ones_after_it():
    T = 2 * Q
    x, dt, A, b, c, state, _, _ = inputs(T)
    dt = dt.clamp(max=1e-3)
    dt[:, 3::7] = 1e4
    assert_within_limits("ssd_scan", torch.float32, ssd_scan_triton(x, dt, A, b, c, state, None), oracle(x, dt, A, b, c, state, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_numerics_give_the_same_bits_for_every_split(dtype):
    T = 23
    x, dt, A, b, c, state, cos, sin = inputs(T, dtype)
    with numerics("exact"):
        y, final = ssd_scan_triton(x, dt, A, b, c, state, None, cos, sin)
        assert_within_limits("ssd_scan_rope", dtype, (y, final), oracle(x, dt, A, b, c, state, None, cos, sin))
        for sizes in ([1] * T, [5, 1, 17]):
            now, parts = state.clone(), []
            for part in zip(*(value.split(sizes, 1) for value in (x, dt, b, c, cos, sin)), strict=True):
                x_, dt_, b_, c_, cos_, sin_ = part
                parts.append(ssd_scan_triton(x_, dt_, A, b_, c_, now, None, cos_, sin_, in_place=True)[0])
            assert torch.equal(torch.cat(parts, 1), y)
            assert torch.equal(now, final)
    # One token after another is what a step does in any case.
    x, dt, b, c, cos, sin = (value[:, :1] for value in (x, dt, b, c, cos, sin))
    assert torch.equal(ssd_scan_triton(x, dt, A, b, c, state, None, cos, sin)[0], y[:, :1])


def test_the_same_call_twice_is_bitwise_equal():
    x, dt, A, b, c, state, cos, sin = inputs(3 * Q, B=1)
    first, second = (ssd_scan_triton(x, dt, A, b, c, state, None, cos, sin) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_regimes_depend_on_integers_alone():
    x, dt, A, b, c, state, cos, sin = inputs(4 * Q)
    call = call_of(x, dt, A, b, c, state, None, cos, sin)
    names = [plans.regime(replace(call, arch="sm_90", B=B, T=T)) for B, T in ((1, 1), (2, 512), (1, 10**6), (4096, 10**4))]
    assert names == ["tokens", "narrow", "carry", "crowd"]
    assert set(names) <= set(plans.REGIMES)
    assert plans.regime(replace(call, exact=True)) == "tokens"
    scratch = [sum(plan_bytes(replace(call, arch="sm_90", T=T))) for T in (2**16, 2**17)]
    assert scratch[1] <= 2.2 * scratch[0]


def test_no_grid_is_too_large_for_a_device():
    x, dt, A, b, c, state, cos, sin = inputs(2)
    call = replace(call_of(x, dt, A, b, c, state, None, cos, sin), arch="sm_90", H=32)
    for B, T in ((5000, 1), (5000, 100), (1, 5 * 10**6)):
        for launch in plans.plan(replace(call, B=B, T=T)).launches:
            assert launch.grid[0] < 2**31
            assert all(size < 2**16 for size in launch.grid[1:])


def plan_bytes(call):
    return [torch.Size(wanted.shape).numel() * wanted.dtype.itemsize for wanted in plans.plan(call).scratch.values()]


@pytest.mark.skipif(not CUDA, reason="more than 2^31 elements need a GPU's memory")
@pytest.mark.parametrize(("T", "H", "name"), [(600_000, 64, "fold"), (2_400_000, 16, "carry")])
def test_more_than_two_to_the_31_elements(T, H, name):
    """Offsets of 32 bits would wrap around. What the first tokens leave reaches the last: most steps are 0, which keep a state as it is,
    and the others are tokens enough to compare with one after another.
    """
    x = torch.empty((1, T, H, 64), dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    b, c = (torch.randn((1, T, 1, 64), device="cuda").bfloat16() for _ in range(2))
    live = torch.cat((torch.arange(0, T - 200, T // 600), torch.arange(T - 200, T))).to("cuda")
    dt, A = torch.zeros((1, T, H), device="cuda"), -torch.logspace(-3, 0, H, device="cuda")
    dt[:, live] = 0.5 + torch.rand((1, len(live), H), device="cuda")
    assert plans.regime(call_of(x, dt, A, b, c, None, None)) == name
    y, state = ssd_scan_triton(x, dt, A, b, c, None, None)
    expected = oracle(x[:, live], dt[:, live], A, b[:, live], c[:, live], None, None)
    assert_within_limits("ssd_scan", torch.bfloat16, (y[:, live], state), expected)


@pytest.mark.skipif(not CUDA, reason="compiled kernels are counted on a GPU")
def test_no_kernel_is_compiled_more_than_twice_for_64_lengths():
    from wm_kernels.ssd_scan import triton_kernel

    names = ("prepare", "scan_segments", "segment_states", "carry_states", "scan_tokens")

    def compiled():
        return [sum(len(cache[0]) for cache in getattr(triton_kernel, name).device_caches.values()) for name in names]

    before, B, H, P, N, F = compiled(), 1, 16, 32, 32, 16
    for T in LENGTHS:
        x, dt, A, b, c, state, cos, sin = inputs(T, torch.bfloat16, B, H, P, H, N, F)
        ssd_scan_triton(x, dt, A, b, c, state, None, cos, sin)
    assert all(now - then <= 2 for now, then in zip(compiled(), before, strict=True))


LENGTHS = [*range(1, 10), *(Q * k + d for k in (1, 2, 3, 10, 100) for d in (-1, 0, 1)), *range(500, 12500, 300)]
