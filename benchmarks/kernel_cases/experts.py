"""Cases of routers and expert mixtures, and of a CDMoE layer beside mixtures of equal active parameters.

M tokens   D model   R retrieval heads   d half a query's width   J sub-keys per half   E experts   k picks   Q = R*k   I inner width
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from kernel_cases import Case, Inputs, Space, grid
from kernel_cases._common import compiled, eager, exactly, generator, normal, once, over_budget, wide
from wm_kernels.expert_mix import expert_mix_reference
from wm_kernels.moe_mix import moe_mix_reference
from wm_kernels.product_key_topk import product_key_topk_reference
from wm_kernels.router_topk import router_topk_reference

CHECKED = 256  # tokens whose outputs are compared with float64
DTYPE = "bfloat16"


def cases() -> list[Case]:
    """Product keys and expert mixture at M; routers; a mixture of wide experts; layers."""
    made = [product_keys("M", 16384, 4, 64, 128, 8), product_keys("k 16", 16384, 4, 64, 128, 16), product_keys("step", 64, 4, 64, 128, 8)]
    made += [product_keys("J 32 k 32", 16384, 8, 64, 32, 32), product_keys("J 64 k 32", 16384, 8, 64, 64, 32)]
    made += [product_keys("E 1M", 4096, 8, 128, 1024, 16)]
    made += [mixture("M", 16384, 2048, 16384, 4, 8), mixture("E 1024", 16384, 1024, 1024, 4, 8), mixture("step", 64, 2048, 16384, 4, 8)]
    made += [router("E 64", 16384, 64, 8), router("E 1024", 16384, 1024, 32), router("step", 64, 64, 8)]
    made += [wide_experts("E 64 k 8", 8192, 1024, 64, 512, 8), wide_experts("step", 8, 1024, 64, 512, 8)]
    own = (("E 64 k 8", 8192, 1024, 64, 512, 8), ("E 4 k 1", 4096, 1024, 4, 2816, 1), ("E 8 k 2", 4096, 4096, 8, 14336, 2))
    made += [wide_experts(f"{name}, own", *sizes, own=True) for name, *sizes in (*own, ("thin", 64, 1024, 64, 512, 8))]
    made += [wide_experts("step of one", 1, 4096, 16, 14336, 2), retrieval("M", 16384, 2048, 16384, 4, 8, 64)]
    # Exact numerics take other tiles, or other kernels; a step is one of 64 tokens, or of 8.
    made += [exactly(case, "step", 16384 / 64) for case in (product_keys("M", 16384, 4, 64, 128, 8), router("E 64", 16384, 64, 8))]
    made.append(exactly(mixture("M", 16384, 2048, 16384, 4, 8), "step", 16384 / 64))
    made.append(exactly(wide_experts("E 64 k 8", 8192, 1024, 64, 512, 8), "step", 8192 / 8))
    return made + [layer(E, k) for E in (1024, 4096) for k in (8, 16, 32)]


def spaces() -> list[Space]:
    """Tiles of the routers; slices, tokens and rows of the mixture."""
    keys = {"block_M": 64, "num_warps": 4}
    tiles = grid(block_M=[16, 32], num_warps=[1, 2, 4]) + grid(block_M=[64, 128], num_warps=[4, 8])
    made = [Space(product_keys("M", 16384, 4, 64, 128, 8), "many", {}, keys, [tiles])]
    made.append(Space(product_keys("step", 64, 4, 64, 128, 8), "few", {}, keys, [grid(block_M=[16], num_warps=[1, 2, 4])]))
    full = grid(block_M=[16], num_warps=[1, 2]) + grid(block_M=[32], num_warps=[2, 4]) + grid(block_M=[64], num_warps=[4])
    made.append(Space(product_keys("J 32 k 32", 16384, 8, 64, 32, 32), "many", {"J": 32, "k": 32}, keys, [full]))
    million = grid(block_M=[16], num_warps=[4, 8]) + grid(block_M=[64], num_warps=[8, 16])
    made.append(Space(product_keys("E 1M", 4096, 8, 128, 1024, 16), "many", {"J": 1024}, keys, [million]))
    start = {"inner_D": 256, "inner_tokens": 8, "picks": 32, "inner_Q": 16, "inner_warps": 1}
    start |= {"outer_D": 256, "outer_tokens": 8, "outer_Q": 16, "outer_warps": 1}
    inner = grid(inner_D=[64, 128, 256], inner_Q=[8, 16, 32], inner_warps=[1]) + grid(
        inner_D=[256, 512], inner_Q=[16, 32], inner_warps=[2, 4]
    )
    outer = grid(outer_D=[64, 128, 256], outer_Q=[8, 16, 32], outer_warps=[1]) + grid(
        outer_D=[512, 1024], outer_Q=[8, 16], outer_warps=[2, 4]
    )
    inner += grid(inner_D=[2048], inner_Q=[4, 8], inner_warps=[4, 8])
    tokens = [grid(inner_tokens=[1, 4, 16, 64]), grid(outer_tokens=[1, 4, 16, 64])]
    for case, dims in ((mixture("M", 16384, 2048, 16384, 4, 8), {}), (mixture("E 1024", 16384, 1024, 1024, 4, 8), {"D": 1024})):
        made.append(Space(case, "many", dims, start, [inner, outer, *tokens]))
    few = start | {"inner_D": 8192, "inner_tokens": 1, "picks": 4, "inner_Q": 4, "inner_warps": 4, "outer_D": 128, "outer_tokens": 1}
    splits = [grid(picks=[1], inner_Q=[1], inner_warps=[2, 4, 8]) + grid(picks=[4, 8], inner_Q=[4], inner_warps=[4, 8])]
    splits.append(grid(outer_D=[64, 128, 256], outer_Q=[16, 32], outer_warps=[1]))
    made.append(Space(mixture("step", 64, 2048, 16384, 4, 8), "few", {}, few, splits))
    tiles = {"BLOCK_R": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    shapes = grid(BLOCK_R=[64], BLOCK_N=[128, 256], num_warps=[4, 8]) + grid(BLOCK_R=[128], BLOCK_N=[128, 256], num_warps=[4, 8])
    depths = [grid(num_stages=[2, 3, 4]), grid(BLOCK_K=[32, 64, 128])]
    made.append(Space(wide_experts("E 64 k 8, own", 8192, 1024, 64, 512, 8, own=True), "tiles", {}, tiles, [shapes, *depths]))
    thin = {"BLOCK_R": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    shapes = grid(BLOCK_R=[16, 32, 64], BLOCK_N=[64, 128, 256], num_warps=[4])
    made.append(Space(wide_experts("thin, own", 64, 1024, 64, 512, 8, own=True), "thin", {}, thin, [shapes, *depths]))
    narrow = grid(elements=[256, 512, 1024, 2048], num_warps=[1]) + grid(elements=[2048, 4096], num_warps=[4])
    made.append(Space(router("E 64", 16384, 64, 8), "narrow", {}, {"elements": 1024, "num_warps": 1}, [narrow]))
    full = grid(elements=[1024], num_warps=[1, 2]) + grid(elements=[2048, 4096], num_warps=[4])
    made.append(Space(router("E 1024", 16384, 1024, 32), "narrow", {"E": 1024}, {"elements": 1024, "num_warps": 1}, [full]))
    return made


def product_keys(name: str, M: int, R: int, d: int, J: int, k: int) -> Case:
    """The choice of experts from made queries."""

    def make() -> Inputs:
        g = generator()
        # The two halves are the slowest axis of the projection that makes queries.
        query = normal(g, 1, M, 2, R, d, dtype=DTYPE).transpose(2, 3)
        return {"query": query, "keys": normal(g, R, J, 2, d, dtype=DTYPE, scale=d**-0.5)}

    def ours(v: Inputs) -> Any:
        return ops.product_key_topk(v["query"], v["keys"], k)

    def oracle(v: Inputs) -> float:
        query = v["query"][:, :CHECKED]
        weight, expert = (y[:, :CHECKED] for y in ours(v))
        truth, expected = once(v, lambda: product_key_topk_reference(*wide(query, v["keys"]), k))
        wrong = (expert != expected).double().mean().item() / 1e-3  # of the limit on differing choices
        return max(over_budget("product_key_topk", DTYPE, [weight], [truth]), wrong)

    def formula(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bmrhd,rjhd->hbmrj", query, keys)
        values, indices = scores.topk(k)
        sums = (values[0].unsqueeze(-1) + values[1].unsqueeze(-2)).flatten(-2)
        experts = (indices[0].unsqueeze(-1) * J + indices[1].unsqueeze(-2)).flatten(-2)
        best, place = sums.topk(k)
        return best.softmax(-1), experts.gather(-1, place)

    peers = {"eager": eager(formula, "query", "keys"), "torch.compile": compiled(formula, "query", "keys")}
    size = M * R * 2 * d * 2 + R * J * 2 * d * 2 + M * R * k * 10
    bars = {"× eager": 8.0, "× torch.compile": 5.0, "launches": 1} if name == "M" else {"launches": 1}
    return Case("product_key_topk", name, DTYPE, make, ours, oracle, peers, size, 4 * M * R * J * d, bars)


def mixture(name: str, M: int, D: int, E: int, R: int, k: int) -> Case:
    """One-neuron experts, chosen at random."""

    def make() -> Inputs:
        g = generator()
        x, down, up = normal(g, 1, M, D, dtype=DTYPE), *(normal(g, E, D, dtype=DTYPE, scale=D**-0.5) for _ in range(2))
        weight = torch.softmax(normal(g, 1, M, R, k), -1).bfloat16()
        return {"x": x, "expert": torch.randint(E, (1, M, R, k), generator=g, device="cuda"), "weight": weight, "down": down, "up": up}

    def ours(v: Inputs) -> Any:
        return ops.expert_mix(v["x"], v["expert"], v["weight"], v["down"], v["up"], "silu", False)

    def oracle(v: Inputs) -> float:
        rows = [slice(0, CHECKED), slice(M - CHECKED, M)] if M > CHECKED else [slice(0, M)]
        tables = (v["down"], v["up"])
        inputs = [wide(v["x"][:, part], v["expert"][:, part], v["weight"][:, part], *tables) for part in rows] if "truth" not in v else []
        truth = once(v, lambda: [expert_mix_reference(*given, "silu", False) for given in inputs])
        y = ours(v)
        return over_budget("expert_mix", DTYPE, [y[:, part] for part in rows], truth)

    def formula(x: Tensor, expert: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = torch.einsum("bmd,bmrkd->bmrk", x, F.embedding(expert, down))
        return torch.einsum("bmrk,bmrkd->bmd", F.silu(inner) * weight, F.embedding(expert, up))

    names = ("x", "expert", "weight", "down", "up")
    peers = {"eager": eager(formula, *names), "torch.compile": compiled(formula, *names)}
    rows = min(2 * E, 2 * M * R * k)
    size = 2 * M * D * 2 + rows * D * 2 + M * R * k * 10
    bars = {"× eager": 4.0, "× torch.compile": 1.5, "memory ÷ eager": 0.02} if name == "M" else {}
    return Case("expert_mix", name, DTYPE, make, ours, oracle, peers, size, 4 * M * R * k * D, bars)


def router(name: str, M: int, E: int, k: int) -> Case:
    """Softmax over all experts, the k likeliest."""

    def make() -> Inputs:
        return {"logits": normal(generator(), M, E, dtype=DTYPE)}

    def ours(v: Inputs) -> Any:
        return ops.router_topk(v["logits"], k, False)

    def oracle(v: Inputs) -> float:
        (weight, expert), (truth, expected) = ours(v), once(v, lambda: router_topk_reference(v["logits"].double(), k, False))
        return max(over_budget("router_topk", DTYPE, [weight], [truth]), 0.0 if torch.equal(expert, expected) else float("inf"))

    def formula(logits: Tensor) -> Any:
        return torch.softmax(logits.float(), -1).topk(k)

    peers = {"eager": eager(formula, "logits"), "torch.compile": compiled(formula, "logits")}
    return Case("router_topk", name, DTYPE, make, ours, oracle, peers, M * E * 2 + M * k * 10, 4 * M * E, {"× eager": 1.0})


GROUPS = 512  # of one grouped product: torch's takes fewer than 1024


def grouped_mixture(x: Tensor, expert: Tensor, weight: Tensor, matrix_in: Tensor, matrix_out: Tensor, gated: bool) -> Tensor:
    """What torch offers: tokens sorted by expert, two grouped products, the sum by index_add. Past `GROUPS` experts it waits for counts."""
    E, k = matrix_in.shape[0], expert.shape[1]
    order = expert.flatten().argsort()
    ends = torch.bincount(expert.flatten(), minlength=E).cumsum(0)
    bounds = [0, order.shape[0]] if E <= GROUPS else [0, *ends[GROUPS - 1 :: GROUPS].tolist()]
    y = torch.zeros_like(x)
    for part, (first, last) in enumerate(pairwise(bounds)):
        some = slice(part * GROUPS, (part + 1) * GROUPS) if E > GROUPS else slice(None)
        picks = order[first:last]
        offsets = (ends[some] - first).to(torch.int32)
        inner = torch._grouped_mm(x[picks // k], matrix_in[some].transpose(1, 2), offs=offsets)
        gate, *rest = inner.chunk(2, -1) if gated else (inner,)
        hidden = F.silu(gate) * rest[0] if gated else F.silu(gate)
        out = torch._grouped_mm(hidden, matrix_out[some].transpose(1, 2), offs=offsets)
        y.index_add_(0, picks // k, out * weight.flatten()[picks].unsqueeze(1))
    return y


def wide_experts(name: str, M: int, D: int, E: int, I: int, k: int, own: bool = False) -> Case:
    """Gated experts of Jamba's and Mixtral's kind; `own`: by the kernels that native plans have for many tokens."""
    few = M * k <= E

    def make() -> Inputs:
        g = generator()
        x, matrix_in, matrix_out = (normal(g, *shape, dtype=DTYPE, scale=shape[-1] ** -0.5) for shape in ((M, D), (E, 2 * I, D), (E, D, I)))
        expert = torch.rand((M, E), generator=g, device="cuda").topk(k).indices
        weight = torch.softmax(normal(g, M, k), -1).bfloat16()
        return {"x": x * D**0.5, "expert": expert, "weight": weight, "in": matrix_in, "out": matrix_out}

    def ours(v: Inputs) -> Any:
        call = ops.moe_mix
        if own:
            from wm_kernels.moe_mix.triton_op import moe_mix_tiles as call
        return call(v["x"], v["expert"], v["weight"], v["in"], None, v["out"], None, "silu", True)

    def oracle(v: Inputs) -> float:
        x, expert, weight, matrix_in, matrix_out = wide(v["x"][:CHECKED], v["expert"][:CHECKED], v["weight"][:CHECKED], v["in"], v["out"])
        truth = moe_mix_reference(x, expert, weight, matrix_in, None, matrix_out, None, "silu", True)
        return over_budget("moe_mix", DTYPE, [ours(v)[:CHECKED]], [truth])

    def looped(v: Inputs) -> Callable[[], Any]:
        return lambda: moe_mix_reference(v["x"], v["expert"], v["weight"], v["in"], None, v["out"], None, "silu", True)

    def gathered(v: Inputs) -> Callable[[], Any]:
        def run() -> Tensor:
            gate, rest = torch.matmul(v["in"][v["expert"]], v["x"][:, None, :, None]).squeeze(-1).chunk(2, -1)
            out = torch.matmul(v["out"][v["expert"]], (F.silu(gate) * rest).unsqueeze(-1)).squeeze(-1)
            return torch.matmul(v["weight"].unsqueeze(1), out).squeeze(1)

        return run

    peers = {"looped": looped, "torch grouped": eager(grouped_mixture, "x", "expert", "weight", "in", "out", gated=True)}
    bars = {"× looped": 1.0, "× torch grouped": 1.0} | ({"× gathered": 1.0} if few else {})
    size = 2 * M * D * 2 + 3 * min(E, M * k) * D * I * 2
    return Case("moe_mix", name, DTYPE, make, ours, oracle, peers | ({"gathered": gathered} if few else {}), size, 6 * M * k * D * I, bars)


def retrieval(name: str, M: int, D: int, E: int, R: int, k: int, d: int) -> Case:
    """Queries, product keys and mixture: what the module of PEER-pytorch does, with its options for softmax and SiLU."""
    J = int(E**0.5)

    def make() -> Inputs:
        g = generator()
        shapes = {"x": (M, D), "query": (2 * R * d, D), "keys": (R, J, 2, d), "down": (E, D), "up": (E, D)}
        return {key: normal(g, *shape, dtype=DTYPE, scale=1.0 if key == "x" else shape[-1] ** -0.5) for key, shape in shapes.items()}

    def picks(v: Inputs) -> tuple[Tensor, Tensor]:
        return ops.product_key_topk(F.linear(v["x"], v["query"]).view(1, M, 2, R, d).transpose(2, 3), v["keys"], k)

    def ours(v: Inputs) -> Tensor:
        weight, expert = picks(v)
        return ops.expert_mix(v["x"].unsqueeze(0), expert, weight, v["down"], v["up"], "silu", False)

    def oracle(v: Inputs) -> float:
        weight, expert = (value[:, :CHECKED] for value in picks(v))
        inputs = wide(v["x"][None, :CHECKED], expert, weight, v["down"], v["up"])
        return over_budget("expert_mix", DTYPE, [ours(v)[:, :CHECKED]], [expert_mix_reference(*inputs, "silu", False)])

    def module(v: Inputs) -> torch.nn.Module:
        from PEER_pytorch import PEER

        options = {"heads": R, "num_experts": E, "num_experts_per_head": k, "dim_key": d, "non_competing_scores": False}
        made = PEER(D, activation=torch.nn.SiLU, **options).to("cuda", torch.bfloat16).requires_grad_(False)
        made.to_queries[0].weight.copy_(v["query"])
        made.keys.copy_(v["keys"])
        made.weight_down_embed.weight.copy_(v["down"])
        made.weight_up_embed.weight.copy_(v["up"])
        return made

    def as_is(v: Inputs) -> Callable[[], Any]:
        made, x = module(v), v["x"].unsqueeze(0)
        return lambda: made(x)

    def made_fast(v: Inputs) -> Callable[[], Any]:
        made, x = torch.compile(module(v), mode="max-autotune-no-cudagraphs", dynamic=False), v["x"].unsqueeze(0)
        return lambda: made(x)

    peers = {"PEER-pytorch": as_is, "PEER-pytorch compiled": made_fast}
    size = 2 * M * D * 2 + 2 * (2 * E * D + 2 * R * d * D)
    flops = 4 * M * D * R * (d + k) + 4 * M * R * J * d
    return Case("PEER layer", name, DTYPE, make, ours, oracle, peers, size, flops, {"× PEER-pytorch": 4.0, "× PEER-pytorch compiled": 1.5})


def layer(E: int, k: int, M: int = 16384, D: int = 1024, width: int = 8, shared: int = 1024) -> Case:
    """A CDMoE layer beside a mixture with a shared expert: E experts and an equal number of active parameters in both.

    CDMoE picks k of E one-neuron experts in each of `width` retrieval heads. The mixture picks k of E experts of `width` neurons, the
    narrowest that torch's grouped product takes. Queries and router count, and the same shared expert of two matrices.
    """
    R, d, J = width, 64, int(E**0.5)

    def make() -> Inputs:
        g = generator()
        shapes = {"x": (M, D), "shared_in": (shared, D), "shared_out": (D, shared), "query": (2 * R * d, D), "keys": (R, J, 2, d)}
        shapes |= {"down": (E, D), "up": (E, D), "router": (E, D), "in": (E, width, D), "out": (E, D, width)}
        return {name: normal(g, *shape, dtype=DTYPE, scale=1.0 if name == "x" else shape[-1] ** -0.5) for name, shape in shapes.items()}

    def shared_expert(v: Inputs) -> Tensor:
        return F.linear(F.silu(F.linear(v["x"], v["shared_in"])), v["shared_out"])

    def picks(v: Inputs) -> tuple[Tensor, Tensor]:
        query = F.linear(v["x"], v["query"]).view(1, M, 2, R, d).transpose(2, 3)
        return ops.product_key_topk(query, v["keys"], k)

    def ours(v: Inputs) -> Tensor:
        weight, expert = picks(v)
        return shared_expert(v) + ops.expert_mix(v["x"].unsqueeze(0), expert, weight, v["down"], v["up"], "silu", False)[0]

    def oracle(v: Inputs) -> float:
        weight, expert = picks(v)
        inputs = wide(v["x"][None, :CHECKED], expert[:, :CHECKED], weight[:, :CHECKED], v["down"], v["up"])
        y = ops.expert_mix(v["x"].unsqueeze(0), expert, weight, v["down"], v["up"], "silu", False)
        return over_budget("expert_mix", DTYPE, [y[:, :CHECKED]], [expert_mix_reference(*inputs, "silu", False)])

    def routed(v: Inputs) -> tuple[Tensor, Tensor]:
        value, expert = F.linear(v["x"], v["router"]).softmax(-1).topk(k)
        return value, expert

    def grouped(v: Inputs) -> Callable[[], Any]:
        def run() -> Tensor:
            weight, expert = routed(v)
            return shared_expert(v) + grouped_mixture(v["x"], expert, weight, v["in"], v["out"], False)

        return run

    def looped(v: Inputs) -> Callable[[], Any]:
        def run() -> Tensor:
            weight, expert = routed(v)
            y = shared_expert(v)
            for e in range(E):
                row, pick = (expert == e).nonzero(as_tuple=True)
                hidden = F.silu(F.linear(v["x"][row], v["in"][e]))
                y.index_add_(0, row, F.linear(hidden, v["out"][e]) * weight[row, pick].unsqueeze(1))
            return y

        return run

    flops = M * (4 * D * shared + 4 * R * k * D + 4 * R * d * D + 4 * R * J * d)
    bars = {"× grouped mixture": 1.5} | ({"× looped mixture": 10.0} if E == 1024 else {})
    peers = {"grouped mixture": grouped, "looped mixture": looped}
    size = 2 * M * D * 2 + 2 * (2 * D * shared + 2 * E * D + 2 * R * d * D)
    return Case("CDMoE layer", f"E {E} k {k}", DTYPE, make, ours, oracle, peers, size, flops, bars)
