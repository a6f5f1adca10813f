"""The Triton kernels of routers and expert mixtures against the float64 reference. B rows, T tokens, E experts, k picks."""

import pytest
import torch

from triton_support import DEVICE, DTYPES, ON_CUDA, check, needs_triton, random, scattered, wide  # first: it chooses the interpreter
from wm_kernels.expert_mix.definition import expert_mix_reference
from wm_kernels.moe_mix.definition import moe_mix_reference
from wm_kernels.product_key_topk.definition import product_key_topk_reference
from wm_kernels.router_topk.definition import router_topk_reference

pytestmark = needs_triton


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same_choices(got, expected, scores, dtype):
    """Equal, but for neighbours whose float64 scores differ by less than the scores' rounding."""
    differing = got != expected
    if differing.any():
        gap = (scores.gather(-1, got) - scores.gather(-1, expected)).abs()[differing].max().item()
        assert gap <= 2e-6 * scores.abs().max().item(), f"{dtype}: a choice is worse by {gap:.3g}"


MANY = ((1, 1030, 1024, 2, 8), (2, 530, 300, 2, 4)) if ON_CUDA else ()  # tokens that share experts' rows, of each configuration


def all_scores(query, keys):
    """Of every expert, [B, T, R, J * J] in float64."""
    x, y = torch.einsum("btrhd,rjhd->hbtrj", query.double(), keys.double()).unbind(0)
    return (x.unsqueeze(-1) + y.unsqueeze(-2)).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "R", "d", "J", "k"),
    [(2, 9, 2, 8, 12, 4), (1, 17, 1, 16, 16, 8), (1, 5, 2, 20, 40, 13), (1, 3, 1, 4, 3, 3), (1, 3, 1, 4, 5, 1), (1, 530, 1, 8, 6, 2)],
)
@pytest.mark.parametrize("kind", ["random", "coarse", "equal"])
def test_product_key_topk(dtype, B, T, R, d, J, k, kind):
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

    g = seeded()
    # The two halves are the slowest axis of the projection that makes queries.
    query, keys = random(g, B, T, 2, R, d, dtype=dtype).transpose(2, 3), random(g, R, J, 2, d, dtype=dtype)
    if kind == "coarse":
        query, keys = query.round().clamp(-1, 1), keys.round().clamp(-1, 1)
    if kind == "equal":
        keys = keys * 0
    if kind == "random":
        query = query * d**-0.5
    query, keys = scattered(query, 1), scattered(keys, 2)
    weight, expert = product_key_topk_triton(query, keys, k)
    expected_weight, expected = product_key_topk_reference(query.double(), keys.double(), k)
    check("product_key_topk", dtype, weight, expected_weight)
    assert all(torch.equal(a, b) for a, b in zip((weight, expert), product_key_topk_triton(query, keys, k), strict=True))
    if kind == "random":
        same_choices(expert, expected, all_scores(query, keys), dtype)
    else:
        assert torch.equal(expert, expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("swapped", [False, True])
def test_product_keys_whose_sums_round_to_one_number(k, swapped):
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

    # 1 + a billionth is 1: sums tie whose summands do not, and the best of them by index are not those of the best summands.
    halves = torch.tensor([3e-9, 2e-9, 4e-9, 1e-9]), torch.tensor([1.0, 1.0, 0.5, 0.2])
    halves = halves[::-1] if swapped else halves
    query, keys = torch.ones(1, 1, 1, 2, 1, device=DEVICE), torch.stack(halves, 1).view(1, 4, 2, 1).to(DEVICE)
    got, expected = product_key_topk_triton(query, keys, k), product_key_topk_reference(query, keys, k)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)


@pytest.mark.skipif(not ON_CUDA, reason="more sub-keys than one tile holds are slow without a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "J"), [(50, 2500), (600, 1024)])
def test_product_keys_in_several_tiles(dtype, T, J):
    from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

    g = seeded()
    query, keys = (random(g, 1, T, 2, 2, 16) / 4).to(dtype), random(g, 2, J, 2, 16, dtype=dtype)
    for values in (keys, keys.round()):
        weight, expert = product_key_topk_triton(query, values, 12)
        expected_weight, expected = product_key_topk_reference(query.double(), values.double(), 12)
        check("product_key_topk", dtype, weight, expected_weight)
        assert (expert != expected).float().mean() < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "E", "k"), [(1, 8, 2), (13, 21, 5), (3, 64, 64), (530, 8, 2)])
@pytest.mark.parametrize("normalize", [False, True])
def test_router_topk(dtype, M, E, k, normalize):
    from wm_kernels.router_topk.triton_op import router_topk_triton

    g = seeded()
    for logits in (
        scattered(random(g, M, E, dtype=dtype), 1),
        random(g, M, E, dtype=dtype).round(),
        torch.zeros(M, E, device=DEVICE).to(dtype),
    ):
        weight, expert = router_topk_triton(logits, k, normalize)
        expected_weight, expected = router_topk_reference(logits.double(), k, normalize)
        check("router_topk", dtype, weight, expected_weight)
        assert torch.equal(expert, expected)
        assert all(torch.equal(a, b) for a, b in zip((weight, expert), router_topk_triton(logits, k, normalize), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "D", "R", "k"), [(2, 5, 40, 2, 3), (1, 1, 24, 1, 1), (1, 3, 16, 3, 5), (1, 1030, 8, 1, 2), *MANY])
@pytest.mark.parametrize(("activation", "inside"), [("silu", False), ("gelu", False), ("silu", True)])
def test_expert_mix(dtype, B, T, D, R, k, activation, inside):
    from wm_kernels.expert_mix.triton_op import expert_mix_triton

    g, E = seeded(), 30
    x, weight = scattered(random(g, B, T, D, dtype=dtype), 1), torch.softmax(random(g, B, T, R, k), -1).to(dtype)
    down, up = (scattered(random(g, E, D, dtype=dtype), seed) for seed in (2, 3))
    expert = torch.randint(0, E, (B, T, R, k), generator=g).to(DEVICE)
    y = expert_mix_triton(x, expert, weight, down, up, activation, inside)
    expected = expert_mix_reference(*wide((x, expert, weight, down, up)), activation, inside)
    check("expert_mix", dtype, y, expected)
    assert torch.equal(y, expert_mix_triton(x, expert, weight, down, up, activation, inside))


@pytest.mark.parametrize("dtype", [torch.bfloat16] if ON_CUDA else [torch.float32, torch.float16])
@pytest.mark.parametrize(("B", "T", "D", "R", "k"), [(2, 5, 40, 2, 3), (1, 1, 24, 1, 1), (1, 3, 16, 3, 5)])
@pytest.mark.parametrize(("activation", "inside"), [("silu", False), ("gelu", True)])
def test_expert_mix_by_products_with_all_experts(dtype, B, T, D, R, k, activation, inside, monkeypatch):
    from wm_kernels.expert_mix import triton_op

    g, E = seeded(), 16
    x, weight = scattered(random(g, B, T, D, dtype=dtype), 1), torch.softmax(random(g, B, T, R, k), -1).to(dtype)
    down, up = random(g, E, D, dtype=dtype), random(g, E, D, dtype=dtype)
    expert = torch.randint(0, 7, (B, T, R, k), generator=g).to(DEVICE)  # few, so that a token picks some of them often
    expected = expert_mix_reference(*wide((x, expert, weight, down, up)), activation, inside)
    for at_once in (2**20, 3):  # all tokens together, and a few at a time
        monkeypatch.setattr(triton_op, "products_at_once", lambda E, at_once=at_once: at_once)
        y = triton_op.expert_mix_products(x, expert, weight, down, up, activation, inside)
        check("expert_mix", dtype, y, expected)
        assert torch.equal(y, triton_op.expert_mix_products(x, expert, weight, down, up, activation, inside))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gated", "bias", "activation"), [(True, False, "silu"), (False, True, "gelu"), (True, True, "silu")])
def test_moe_mix_of_few_tokens(dtype, gated, bias, activation):
    from wm_kernels.moe_mix.triton_op import moe_mix_picks

    g, (M, E, D, I, k) = seeded(), (3, 5, 40, 11, 2)
    F = 2 * I if gated else I
    shapes = (E, F, D), (E, F) if bias else None, (E, D, I), (E, D) if bias else None
    matrices = tuple(None if shape is None else scattered(random(g, *shape, dtype=dtype), seed) for seed, shape in enumerate(shapes))
    x, weight = scattered(random(g, M, D, dtype=dtype), 7), torch.rand((M, k), generator=g).to(DEVICE, dtype)
    expert = torch.tensor([[0, 4], [4, 4], [2, 1]], device=DEVICE)
    y = moe_mix_picks(x, expert, weight, *matrices, activation, gated)
    check("moe_mix", dtype, y, moe_mix_reference(*wide((x, expert, weight, *matrices)), activation, gated))
    assert torch.equal(y[1:2], moe_mix_picks(x[1:2], expert[1:2], weight[1:2], *matrices, activation, gated))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "E", "D", "I", "k", "picked"),
    [
        (13, 5, 40, 11, 2, "any"),
        (9, 3, 16, 33, 3, "one"),  # all tokens meet one expert, three times each
        (40, 3, 24, 16, 7, "few"),  # several segments of picks, and experts that nobody picks
        (1, 1, 8, 8, 2, "any"),
    ],
)
@pytest.mark.parametrize(("gated", "bias", "activation"), [(True, False, "silu"), (False, True, "gelu"), (True, True, "silu")])
def test_moe_mix_of_many_tokens(dtype, M, E, D, I, k, picked, gated, bias, activation):
    from wm_kernels.moe_mix.triton_op import moe_mix_tiles

    g, F = seeded(), 2 * I if gated else I
    shapes = (E, F, D), (E, F) if bias else None, (E, D, I), (E, D) if bias else None
    matrices = tuple(None if shape is None else scattered(random(g, *shape, dtype=dtype), seed) for seed, shape in enumerate(shapes))
    x, weight = scattered(random(g, M, D, dtype=dtype), 7), torch.rand((M, k), generator=g).to(DEVICE, dtype)
    expert = torch.randint({"any": 0, "one": E - 1, "few": E - 2}[picked], E, (M, k), generator=g).to(DEVICE)
    y = moe_mix_tiles(x, expert, weight, *matrices, activation, gated)
    check("moe_mix", dtype, y, moe_mix_reference(*wide((x, expert, weight, *matrices)), activation, gated))
    assert torch.equal(y, moe_mix_tiles(x, expert, weight, *matrices, activation, gated))


@pytest.mark.parametrize(("N", "E"), [(1, 1), (255, 3), (256, 8), (700, 5), (1100, 40), (300, 5000)])
def test_picks_are_sorted_by_expert_and_stay_in_their_order(N, E):
    from wm_kernels.moe_mix.plan import SEGMENT, sort_plan
    from wm_kernels.triton_launch import run
    from wm_kernels.triton_support import blocks

    expert = torch.randint(0, E, (N,), generator=seeded()).to(DEVICE)
    expert[::3] = E // 2
    count, end, pick = (torch.full(shape, -7, dtype=torch.int32, device=DEVICE) for shape in ((blocks(N, SEGMENT), E), (E,), (N,)))
    run(sort_plan(N, E), {"expert_N": expert, "count": count, "end": end, "pick": pick})
    assert torch.equal(pick.long(), expert.argsort(stable=True))
    assert torch.equal(end.long(), torch.bincount(expert, minlength=E).cumsum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gated", "bias", "activation"), [(True, False, "silu"), (False, True, "gelu"), (True, True, "silu")])
@pytest.mark.parametrize(("M", "E", "D", "I", "k"), [(13, 5, 70, 9, 3), (3, 4, 24, 70, 1)])  # D or I is more than the interpreter's block
def test_kernels_between_and_after_grouped_products(dtype, gated, bias, activation, M, E, D, I, k, monkeypatch):
    from wm_kernels.moe_mix import triton_op

    def products(rows_NA, matrix_EBA, end_E):
        """What torch's grouped product gives; it has no kernel for every dtype and device."""
        begin = 0
        out_NB = rows_NA.new_empty((len(rows_NA), matrix_EBA.shape[1]))
        for matrix_BA, end in zip(matrix_EBA, end_E.tolist(), strict=True):
            out_NB[begin:end] = rows_NA[begin:end] @ matrix_BA.mT
            begin = end
        return out_NB

    monkeypatch.setattr(triton_op, "grouped_product", products)
    g, F = seeded(), 2 * I if gated else I
    x, weight = random(g, M, D, dtype=dtype), torch.rand((M, k), generator=g).to(DEVICE, dtype)
    shapes = (E, F, D), (E, F) if bias else None, (E, D, I), (E, D) if bias else None
    matrices = tuple(None if shape is None else random(g, *shape, dtype=dtype) for shape in shapes)
    expert = torch.randint(0, E, (M, k), generator=g).to(DEVICE)
    y = triton_op.moe_mix_grouped(x, expert, weight, *matrices, activation, gated)
    check("moe_mix", dtype, y, moe_mix_reference(*wide((x, expert, weight, *matrices)), activation, gated))


@pytest.mark.skipif(not ON_CUDA, reason="torch's grouped product of bfloat16 runs on CUDA alone")
@pytest.mark.parametrize(("M", "E", "D", "I", "k"), [(70, 8, 64, 48, 2), (33, 60, 16, 8, 4), (200, 4, 32, 24, 4)])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_moe_mix(M, E, D, I, k, gated, bias):
    from wm_kernels.moe_mix.triton_op import moe_mix_grouped, serves_grouped

    g, dtype = seeded(), torch.bfloat16
    F = 2 * I if gated else I
    x, weight = random(g, M, D, dtype=dtype), torch.rand((M, k), generator=g).to(DEVICE, dtype)
    matrices = random(g, E, F, D, dtype=dtype), random(g, E, F, dtype=dtype), random(g, E, D, I, dtype=dtype), random(g, E, D, dtype=dtype)
    matrices = tuple(matrix if matrix.dim() == 3 or bias else None for matrix in matrices)
    expert = torch.randint(0, E, (M, k), generator=g).to(DEVICE)
    assert serves_grouped(x, matrices[2])
    y = moe_mix_grouped(x, expert, weight, *matrices, "silu", gated)
    check("moe_mix", dtype, y, moe_mix_reference(*wide((x, expert, weight, *matrices)), "silu", gated))
