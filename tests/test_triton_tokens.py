"""What the number of tokens of a call may change in exact mode: no bit of a token.

B rows, T tokens, M = B*T, D and C channels, E experts, R retrieval heads, k picks
"""

from itertools import pairwise, product

import pytest
import torch

from triton_support import DEVICE, DTYPES, ON_CUDA, needs_triton, random  # first: it chooses the interpreter
from wm_kernels.numerics import numerics

pytestmark = needs_triton

T, WIDTH = (1300, 256) if ON_CUDA else (7, 32)
# Token after token, then pieces of other regimes: of few tokens, of many.
CUTS = [0, 1, 2, 3, 4, 5, 11, 44, 560, 561, T] if ON_CUDA else [0, 1, 2, 5, T]
PIECES = list(pairwise(CUTS))
WIDTHS = (WIDTH, 40, 37)  # rows of 40 float32 are of whole 16 bytes and no multiple of 16 entries; most rows of 37 begin anywhere


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def exact_mode():
    with numerics("exact"):
        yield


def same_bits_in_pieces(whole, call):
    """`call(first, last)` on every piece gives the rows of `whole`."""
    whole = whole if isinstance(whole, tuple) else (whole,)
    for first, last in PIECES:
        part = call(first, last)
        for rows, expected in zip(part if isinstance(part, tuple) else (part,), whole, strict=True):
            assert torch.equal(rows, expected[first:last]), f"tokens {first} to {last} of {T}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype):
    from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton
    from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton

    g = generator()
    for width in WIDTHS:
        x, z, weight = random(g, T, width, dtype=dtype), random(g, T, width, dtype=dtype), random(g, width, dtype=dtype)

        def add(a, b, given=(x, z, weight)):
            x, z, weight = given
            return residual_rms_norm_triton(x[a:b], z[a:b], weight, weight, 1e-6)

        def gate(a, b, given=(x, z, weight)):
            x, z, weight = given
            return gated_rms_norm_triton(x[a:b], z[a:b], weight, 1e-6)

        same_bits_in_pieces(add(0, T), add)
        same_bits_in_pieces(gate(0, T), gate)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers(dtype, gated):
    from wm_kernels.linear.triton_op import linear_triton

    g, parts = generator(), (40, 0, 0, 0) if gated else (30, 0, 45, 5)
    for width in WIDTHS:
        x, weight, bias = random(g, T, width, dtype=dtype), random(g, 80, width, dtype=dtype), random(g, 80, dtype=dtype)
        step_bias = None if gated else random(g, 5, dtype=dtype)

        def layer(a, b, given=(x, weight, bias, step_bias)):
            x, *rest = given
            return linear_triton(x[a:b], *rest, parts, gated)

        same_bits_in_pieces(layer(0, T), layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(dtype):
    from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

    g = generator()
    x, weight, bias = random(g, 2, T, WIDTH, dtype=dtype), random(g, WIDTH, 4, dtype=dtype), random(g, WIDTH, dtype=dtype)
    state = random(g, 2, 3, WIDTH)
    y, after = causal_conv1d_triton(x, weight, bias, state, None, "silu")
    for first, last in PIECES:
        part, state = causal_conv1d_triton(x[:, first:last], weight, bias, state, None, "silu")
        assert torch.equal(part, y[:, first:last]), f"tokens {first} to {last} of {T}"
    assert torch.equal(state, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routers(dtype):
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton
    from wm_kernels.router_topk.triton_op import router_topk_triton

    g, R, J, d, k = generator(), 2, 24, 16, 4
    query, keys = random(g, 1, T, R, 2, d, dtype=dtype), random(g, R, J, 2, d, dtype=dtype)
    for width, normalize in product(WIDTHS, (False, True)):
        logits = random(g, T, width, dtype=dtype)

        def route(a, b, logits=logits, normalize=normalize):
            return router_topk_triton(logits[a:b], k, normalize)

        same_bits_in_pieces(route(0, T), route)
    whole = tuple(value[0] for value in product_key_topk_triton(query, keys, k))
    same_bits_in_pieces(whole, lambda a, b: tuple(value[0] for value in product_key_topk_triton(query[:, a:b], keys, k)))


@pytest.mark.parametrize("width", WIDTHS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtures(dtype, width):
    from wm_kernels.expert_mix.triton_op import expert_mix_triton
    from wm_kernels.moe_mix.triton_op import moe_mix_triton

    g, E, R, k, I = generator(), 48, 2, 3, 24
    x, weight = random(g, T, width, dtype=dtype), torch.softmax(random(g, T, R, k), -1).to(dtype)
    expert = torch.randint(0, E, (T, R, k), generator=g).to(DEVICE)
    down, up = random(g, E, width, dtype=dtype), random(g, E, width, dtype=dtype)

    def mix(first, last):
        given = x[None, first:last], expert[None, first:last], weight[None, first:last]
        return expert_mix_triton(*given, down, up, "silu", False)[0]

    same_bits_in_pieces(mix(0, T), mix)
    matrices = random(g, E, 2 * I, width, dtype=dtype), None, random(g, E, width, I, dtype=dtype), None

    def wide(first, last):
        return moe_mix_triton(x[first:last], expert[first:last, 0], weight[first:last, 0], *matrices, "silu", True)

    same_bits_in_pieces(wide(0, T), wide)
