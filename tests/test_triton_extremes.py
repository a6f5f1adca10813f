"""Triton kernels at the ends of number formats: products that float16 cannot hold, tensors of more than 2^31 elements.

B rows, T and M tokens, D and C channels, N state, E experts, R retrieval heads, k picks, I inner width
"""

import pytest
import torch

from triton_support import DEVICE, ON_CUDA, check, needs_triton, random, wide  # first: it chooses the interpreter
from wm_kernels.causal_conv1d.definition import causal_conv1d_reference
from wm_kernels.expert_mix.definition import expert_mix_reference
from wm_kernels.gated_rms_norm.definition import gated_rms_norm_reference
from wm_kernels.linear.definition import linear_reference
from wm_kernels.moe_mix.definition import moe_mix_reference
from wm_kernels.product_key_topk.definition import product_key_topk_reference
from wm_kernels.residual_rms_norm.definition import residual_rms_norm_reference
from wm_kernels.router_topk.definition import router_topk_reference
from wm_kernels.selective_scan.definition import selective_scan_reference

# The interpreter computes with numpy, which warns of what is tested here.
pytestmark = [*needs_triton, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")]

F16, BF16 = torch.float16, torch.bfloat16


def generator():
    return torch.Generator().manual_seed(0)


def alike(op, got, reference):
    """Infinite and not a number where the float16 reference is, elsewhere within budget of it."""
    assert torch.equal(got.isnan(), reference.isnan())
    assert torch.equal(got.isinf(), reference.isinf())
    assert torch.equal(got[got.isinf()], reference[reference.isinf()])
    finite = got.isfinite()
    check(op, F16, got[finite], reference[finite].double())


@pytest.mark.parametrize("up", [1e-4, 1.0])  # sums that float16 holds, and that it does not
def test_mixtures_whose_hidden_values_float16_cannot_hold(up):
    from wm_kernels.expert_mix.triton_op import expert_mix_triton
    from wm_kernels.moe_mix.triton_op import moe_mix_picks

    g, M, E, D, k = generator(), 3, 6, 32, 2
    x, table = 300 * random(g, M, D).to(F16), (random(g, E, D) * up).to(F16)
    down, expert = 300 * random(g, E, D).to(F16), torch.randint(0, E, (M, k), generator=g).to(DEVICE)
    assert (x.double() @ down.double().mT).abs().max() > 2**17
    weight = torch.full((M, k), 0.5, dtype=F16, device=DEVICE)
    given = x[None], expert[None, :, None], weight[None, :, None], down, table, "silu", False
    y = expert_mix_triton(*given)
    alike("expert_mix", y, expert_mix_reference(*given))
    assert bool(y.isinf().any()) == (up == 1.0)
    given = x, expert, weight, down.view(E, 1, D), None, table.view(E, D, 1), None, "silu", False
    alike("moe_mix", moe_mix_picks(*given), moe_mix_reference(*given))


def test_product_keys_whose_scores_float16_cannot_hold():
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

    g = generator()
    query, keys = 2000 * random(g, 1, 9, 2, 2, 16).to(F16), 2000 * random(g, 2, 12, 2, 16).to(F16)
    (weight, expert), (truth, expected) = product_key_topk_triton(query, keys, 4), product_key_topk_reference(query, keys, 4)
    assert torch.equal(expert, expected)
    alike("product_key_topk", weight, truth)


def test_rows_whose_products_float16_cannot_hold():
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton
    from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton
    from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton

    g, M, D = generator(), 5, 40
    x, z = (20000 * random(g, M, D).to(F16) for _ in range(2))
    x[0], z[0] = x[0] / 100, z[0] / 100  # a row whose sums float16 holds; it does not hold its squares
    weight = random(g, D).to(F16)
    assert (x.float() + z.float()).abs().max() > 65520
    got, expected = residual_rms_norm_triton(x, z, None, weight, 1e-6), residual_rms_norm_reference(x, z, None, weight, 1e-6)
    alike("residual_rms_norm", got[0], expected[0])
    alike("residual_rms_norm", got[1], expected[1])
    alike("gated_rms_norm", gated_rms_norm_triton(x, z, weight, 1e-6), gated_rms_norm_reference(x, z, weight, 1e-6))
    taps = 4 * random(g, D, 4).to(F16)
    for activation in ("none", "silu"):
        y, expected_y = (f(x[None], taps, None, None, None, activation)[0] for f in (causal_conv1d_triton, causal_conv1d_reference))
        assert y.isinf().any()
        alike("causal_conv1d", y, expected_y)


@pytest.mark.parametrize("M", [1, 2, 5, 40])
def test_linear_layers_whose_outputs_float16_cannot_hold(M):
    from wm_kernels.linear.triton_op import linear_triton

    g, parts = generator(), (20, 0, 9, 11)
    x, weight = 300 * random(g, M, 32).to(F16), (300 * random(g, 40, 32)).to(F16)
    got, expected = linear_triton(x, weight, None, None, parts, False), linear_reference(x, weight, None, None, *parts, False)
    assert got[0].isinf().any()
    assert got[3].isinf().any()  # a step is made of what a layer leaves in float16
    assert got[3].isfinite().any()
    for actual, truth in zip(got, expected, strict=True):
        alike("linear", actual, truth)
    # The reference rounds before it gates, and has NaN where a gate is -inf; the kernel rounds once.
    gated = linear_triton(x, weight, None, None, (20, 0, 0, 0), True)[0]
    alike("linear", gated, linear_reference(*wide((x, weight, None, None)), 20, 0, 0, 0, True)[0].to(F16))
    assert gated.isinf().any()


needs_memory = pytest.mark.skipif(not ON_CUDA, reason="more than 2^31 elements need a GPU's memory")
TAIL = slice(-200, None)


def large(*shape, scale=1.0, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=BF16) * scale


@needs_memory
def test_norms_and_convolution_of_600_000_tokens():
    """Offsets of 32 bits would wrap around."""
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton
    from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton
    from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton

    x, taps = large(1, 600_000, 4096), large(4096, 4)
    y, after = causal_conv1d_triton(x, taps, None, None, None, "silu")
    expected, _ = causal_conv1d_reference(*wide((x[:, TAIL], taps, None, None, None)), "silu")
    check("causal_conv1d", BF16, y[:, TAIL][:, 3:], expected[:, 3:])
    assert torch.equal(after, x[:, -3:].float())
    del y
    x, weight = x[0], taps[:, 0].contiguous()
    for got, truth in zip(
        residual_rms_norm_triton(x, x, None, weight, 1e-6),
        residual_rms_norm_reference(*wide((x[TAIL], x[TAIL], None, weight)), 1e-6),
        strict=True,
    ):
        check("residual_rms_norm", BF16, got[TAIL], truth)
    del got
    truth = gated_rms_norm_reference(*wide((x[TAIL], x[TAIL], weight)), 1e-6)
    check("gated_rms_norm", BF16, gated_rms_norm_triton(x, x, weight, 1e-6)[TAIL], truth)


@needs_memory
def test_more_rows_than_an_axis_of_the_grid_has_programs():
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

    for B, T in ((70_000, 1), (1, 1_100_000)):
        x, taps = large(B, T, 16), large(16, 4)
        y, _ = causal_conv1d_triton(x, taps, None, None, None, "silu")
        check("causal_conv1d", BF16, y, causal_conv1d_reference(*wide((x, taps, None, None, None)), "silu")[0])


@needs_memory
@pytest.mark.parametrize(
    ("M", "K", "parts", "gated"),
    [
        (600_000, 4096, (64, 0, 32, 8), False), (80_000, 64, (30_000, 8, 0, 8), False), (90_000, 64, (25_000, 0, 0, 0), True),
        (1, 4096, (600_000, 0, 0, 8), False), (4, 4096, (300_000, 0, 0, 0), True), (40, 4096, (300_000, 0, 0, 0), True),
        (400, 4096, (600_000, 0, 0, 0), False),
    ],
)  # fmt: skip
def test_linear_layers_of_more_than_two_to_the_31_entries(M, K, parts, gated):
    """Of the input, of an output, of the weight, the second half of which is a gate's other factor."""
    from wm_kernels.linear.triton_op import linear_triton

    N = sum(parts) * (2 if gated else 1)
    x, weight = large(M, K), large(N, K, scale=K**-0.5)
    assert max(M * K, M * N, N * K) > 2**31
    some = slice(-64, None)  # of the rows, and of every part's outputs
    halves = weight.view(2, -1, K)[:, some].flatten(0, 1) if gated else torch.cat([part[some] for part in weight.split(list(parts))])
    few = tuple(min(width, 64) for width in parts)
    found = linear_triton(x, weight, None, None, parts, gated)
    for actual, truth in zip(found, linear_reference(*wide((x[some], halves, None, None)), *few, gated), strict=True):
        check("linear", BF16, actual[some, some], truth)


@needs_memory
def test_exact_rows_that_are_more_than_an_axis_of_the_grid_has_programs():
    from wm_kernels.linear.triton_op import linear_triton
    from wm_kernels.numerics import numerics

    x, weight = large(70_000, 64), large(24, 64, scale=0.125)
    with numerics("exact"):
        y = linear_triton(x, weight, None, None, (24, 0, 0, 0), False)[0]
    check("linear", BF16, y, (x.double() @ weight.double().mT))


@needs_memory
def test_routers_of_more_than_two_to_the_31_entries():
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton
    from wm_kernels.router_topk.triton_op import router_topk_triton

    logits = large(2_100_000, 1040)
    got, expected = router_topk_triton(logits, 4, True), router_topk_reference(logits[TAIL].double(), 4, True)
    check("router_topk", BF16, got[0][TAIL], expected[0])
    assert torch.equal(got[1][TAIL], expected[1])
    del logits, got
    query, keys = large(1, 4_300_000, 4, 2, 64), large(4, 32, 2, 64, scale=0.125)
    weight, expert = product_key_topk_triton(query, keys, 2)
    truth, expected = product_key_topk_reference(*wide((query[:, TAIL], keys)), 2)
    check("product_key_topk", BF16, weight[:, TAIL], truth)
    assert (expert[:, TAIL] != expected).double().mean() < 1e-3


@needs_memory
@pytest.mark.parametrize("products", [False, True])
def test_expert_mix_of_more_than_two_to_the_31_entries(products):
    from wm_kernels.expert_mix.triton_op import expert_mix_products, expert_mix_triton

    M, D, E, k = 1_060_000, 2048, 512, 8
    x, down, up = large(1, M, D), large(E, D, scale=D**-0.5), large(E, D)
    expert = torch.randint(0, E, (1, M, 1, k), device="cuda")
    weight = torch.softmax(large(1, M, 1, k), -1)
    y = (expert_mix_products if products else expert_mix_triton)(x, expert, weight, down, up, "silu", False)
    tail = wide((x[:, TAIL], expert[:, TAIL], weight[:, TAIL], down, up))
    check("expert_mix", BF16, y[:, TAIL], expert_mix_reference(*tail, "silu", False))


@needs_memory
def test_moe_mix_of_more_than_two_to_the_31_entries():
    from wm_kernels.moe_mix.triton_op import moe_mix_grouped, serves_grouped

    M, E, D, I, k = 270_000, 8, 64, 512, 8
    x, matrix_in, matrix_out = large(M, D), large(E, 2 * I, D, scale=D**-0.5), large(E, D, I, scale=I**-0.5)
    if not serves_grouped(x, matrix_out):
        pytest.skip("torch's grouped product does not run on this device")
    expert, weight = torch.randint(0, E, (M, k), device="cuda"), torch.softmax(large(M, k), -1)
    y = moe_mix_grouped(x, expert, weight, matrix_in, None, matrix_out, None, "silu", True)
    truth = moe_mix_reference(*wide((x[TAIL], expert[TAIL], weight[TAIL], matrix_in, None, matrix_out, None)), "silu", True)
    check("moe_mix", BF16, y[TAIL], truth)


@needs_memory
@pytest.mark.parametrize(("M", "k", "D", "I"), [(2_100_000, 1, 1024, 64), (270_000, 8, 1024, 64), (270_000, 8, 64, 1024)])
def test_tiles_of_moe_mix_of_more_than_two_to_the_31_entries(M, k, D, I):
    """Of tokens, of a summand of every pick, of the hidden layer."""
    from wm_kernels.moe_mix.triton_op import moe_mix_tiles

    E = 8
    x, matrix_in, matrix_out = large(M, D), large(E, 2 * I, D, scale=D**-0.5), large(E, D, I, scale=I**-0.5)
    expert, weight = torch.randint(0, E, (M, k), device="cuda"), torch.softmax(large(M, k), -1)
    assert max(M * D, M * k * D, M * k * I) > 2**31
    y = moe_mix_tiles(x, expert, weight, matrix_in, None, matrix_out, None, "silu", True)
    truth = moe_mix_reference(*wide((x[TAIL], expert[TAIL], weight[TAIL], matrix_in, None, matrix_out, None)), "silu", True)
    check("moe_mix", BF16, y[TAIL], truth)


@needs_memory
@pytest.mark.parametrize(("B", "T", "name"), [(1, 600_000, "chunks"), (32, 18_000, "sweep")])
def test_selective_scan_of_more_than_two_to_the_31_entries(B, T, name):
    """Most steps are 0, which keep a state as it is: what the first tokens leave reaches the last, and the others are tokens enough to
    compare with one after another.
    """
    from wm_kernels.selective_scan.plan import regime
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    C, N, last = 4096, 16, slice(-64, None)
    assert regime(T, B * C) == name
    x, b, c = large(B, T, C), large(B, T, N, seed=1), large(B, T, N, seed=2)
    assert x.numel() > 2**31
    live = torch.cat((torch.arange(0, T - 100, T // 300), torch.arange(T - 100, T))).to("cuda")
    dt, A = torch.zeros((B, T, C), device="cuda"), -torch.logspace(-3, 0, N, device="cuda").repeat(C, 1)
    dt[:, live] = 0.5 + torch.rand((B, len(live), C), device="cuda")
    y, state = selective_scan_triton(x, dt, A, b, c, None, None)
    some = x[-1:, live, last], dt[-1:, live, last], A[last], b[-1:, live], c[-1:, live]
    expected_y, expected_state = selective_scan_reference(*wide((*some, None, None)))
    check("selective_scan", BF16, y[-1:, live, last], expected_y)
    check("selective_scan", BF16, state[-1:, last], expected_state)
