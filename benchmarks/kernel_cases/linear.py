"""Cases of linear layers with what follows them: parts, step sizes, a gate; the shapes of Cheems of 320 M parameters.

M tokens   K inputs   N outputs before gates   A, B, C, H widths of the parts
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wm_kernels as ops
from kernel_cases import Case, Inputs, Space, grid
from kernel_cases._common import compiled, eager, exactly, generator, normal, once, over_budget, wide
from wm_kernels.linear import linear_reference

CHECKED = 128  # rows, the first and the last of them, that are compared with float64
DTYPE = "bfloat16"
SIZE = 2  # bytes of an entry
Parts = tuple[int, int, int, int]
# name: K, widths of the parts, whether they are gated
LAYERS: dict[str, tuple[int, Parts, bool]] = {
    "mixer": (1024, (1024, 1024, 1024, 8), False),
    "gate": (1024, (4096, 0, 0, 0), True),
    "down": (4096, (1024, 0, 0, 0), False),
    "head": (1024, (32768, 0, 0, 0), False),
}
TOKENS = (1, 64, 4096)
BARS = {1: {"× torch.compile": 1.0}, 4096: {"× torch.compile": 0.9}}


def cases() -> list[Case]:
    """A step of one row and of many, and a prefill, of every layer; one with exact numerics."""
    made, mixer = [layer(name, M) for name in LAYERS for M in TOKENS], layer("mixer", 64)
    return [*made, exactly(mixer, "mixer M 1", 64, lambda v: _rows_alike(v, mixer))]


def spaces() -> list[Space]:
    """Few rows by the bytes that a program asks for at once; tiles by their shape and the depth of their pipeline."""
    few = [grid(BLOCK_N=[1, 2, 4, 8, 16], BLOCK_K=[1024, 2048, 4096], num_warps=[1, 2, 4, 8])]
    made = []
    for name, (K, parts, gated) in LAYERS.items():
        dims = {"K": K, "N": sum(parts), "GATED": int(gated)}
        row = {"ROWS": 1, "BLOCK_N": 8, "BLOCK_K": 4096, "weights": 2**16, "num_warps": 4, "num_stages": 1}
        made.append(Space(layer(name, 1), "row", dims, row, few))
        made.append(Space(layer(name, 2), "rows", dims, row | {"up_to": 2, "ROWS": 2}, [*few, grid(ROWS=[1, 2])]))
        narrow = {"up_to": 256, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 6}
        shapes = grid(BLOCK_M=[16, 32, 64], BLOCK_N=[16, 32, 64, 128], BLOCK_K=[64, 128], num_warps=[4])
        made.append(Space(layer(name, 64), "narrow", dims, narrow, [shapes, grid(num_stages=[3, 4, 5, 6])]))
        tiles = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
        shapes = grid(BLOCK_M=[64, 128], BLOCK_N=[64, 128, 256], BLOCK_K=[32, 64], num_warps=[4, 8])
        made.append(Space(layer(name, 4096), "tiles", dims, tiles, [shapes, grid(num_stages=[2, 3, 4], GROUP_M=[4, 8, 16])]))
    return made


def layer(name: str, M: int) -> Case:
    """A layer of the model on M tokens; step sizes have a bias of their own."""
    K, parts, gated = LAYERS[name]
    A, B, C, H = parts
    N = sum(parts) * (2 if gated else 1)

    def make() -> Inputs:
        g = generator()
        step_bias = normal(g, H, dtype=DTYPE) if H else None
        return {"x": normal(g, M, K, dtype=DTYPE), "weight": normal(g, N, K, dtype=DTYPE, scale=K**-0.5), "step_bias": step_bias}

    def ours(v: Inputs) -> Any:
        return ops.linear(v["x"], v["weight"], None, v["step_bias"], A, B, C, H, gated)

    def oracle(v: Inputs) -> float:
        rows = sorted({*range(min(M, CHECKED)), *range(max(0, M - CHECKED), M)})

        def truth() -> Any:
            x, weight, step_bias = wide(v["x"][rows], v["weight"], v["step_bias"])
            assert x is not None
            assert weight is not None
            return linear_reference(x, weight, None, step_bias, A, B, C, H, gated)

        pairs = [(found[rows], true) for found, true in zip(ours(v), once(v, truth), strict=True) if true.numel()]
        return over_budget("linear", DTYPE, [found for found, _ in pairs], [true for _, true in pairs])

    def formula(x: Tensor, weight: Tensor, step_bias: Tensor | None) -> tuple[Tensor, ...]:
        y = F.linear(x, weight)
        if gated:
            gate, up = y.chunk(2, -1)
            return (F.silu(gate) * up,)
        *rest, steps = y.split(list(parts), -1)
        found = tuple(part.contiguous() for part in rest if part.shape[1])
        return found if step_bias is None else (*found, F.softplus(steps.float() + step_bias.float()))

    names = ("x", "weight", "step_bias")
    peers = {"torch.compile": compiled(formula, *names), "eager": eager(formula, *names)}
    size = (M * K + N * K + M * (A + B + C)) * SIZE + 4 * M * H
    return Case("linear", f"{name} M {M}", DTYPE, make, ours, oracle, peers, size, 2 * M * N * K, BARS.get(M, {}))


def _rows_alike(v: Inputs, case: Case) -> bool:
    """Whether rows have the bits in pieces that they have together."""
    whole = case.ours(v)
    pieces = [case.ours(v | {"x": v["x"][first:end]}) for first, end in ((0, 1), (1, 6), (6, 64))]
    return all(torch.equal(torch.cat(parts), together) for *parts, together in zip(*pieces, whole, strict=True))
