"""Launches of attention over contiguous cells.

B batch   T tokens   H query heads   K kv heads   G = H/K   A score heads   P head dimension   L cells
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from wm_kernels.attention import triton_exact as in_chunks
from wm_kernels.attention import triton_kernel as kernels
from wm_kernels.symbolic import least, most
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch, architecture, strides_of
from wm_kernels.triton_support import blocks, dtype_name, power_of_two

MOST_SHARES = 64  # a program joins all shares of a row in registers
WRITTEN = 16  # tokens that a program writes into their cells
Strides = tuple[tuple[str, tuple[int, ...]], ...]
Layout = tuple[tuple[str, torch.Size, tuple[int, ...]], ...]  # names, shapes and strides of tensors


def block_of(size: int) -> int:
    """A tile's length along an axis that a product sums over: at least 16."""
    return max(16, power_of_two(size))


def fitted(values: Mapping[str, Any], P: int) -> dict[str, Any]:
    """The values of a row, whose tiles are meant for P <= 128, with smaller tiles for wider heads."""
    wider = max(1, block_of(P) // 128)
    return {name: max(16, value // wider) if name in ("BLOCK_R", "BLOCK_N") else value for name, value in values.items()}


def regime(T: int, cached: bool, most: int, exact: bool = False) -> str:
    """Up to `most` tokens over a cache have its cells split among programs: `shares`, where bits count `chunks`. Else `cells` or `walk`."""
    few = cached and most >= T
    return ("chunks" if few else "walk") if exact else ("shares" if few else "cells")


def shares_of(programs: int, wanted: int, most: int) -> int:
    """Into how many shares, a power of 2, work of so many programs is cut to make at least `wanted`."""
    shares = 1
    while programs * shares < wanted and shares * 2 <= most:
        shares *= 2
    return shares


@lru_cache(maxsize=1024)
def plan(
    B: int, T: int, H: int, K: int, A: int, P: int, L: int, scoring: str, cached: bool, dtype: torch.dtype, arch: str, strides: Strides,
    exact: bool = False,
) -> Plan:  # fmt: skip
    """Attention to cells 0 .. position + t, or 0 .. t without a cache.

    Args:
        B: rows.
        T: tokens.
        H: query heads.
        K: kv heads, a divisor of H.
        A: score heads, a divisor of H; any where scoring is "none".
        P: head dimension.
        L: cells; T without a cache.
        scoring: "none", "additive" or "binary".
        cached: whether there is a position; without one, row b's first query sees cell 0 alone.
        dtype: of q, k and v.
        arch: see `triton_launch.architecture`.
        strides: in elements, of q_BTHP, k_BLKP, v_BLKP and score_BAL, axes in the order of these names; P's stride is 1. With those of
            new_k_BTKP and new_v_BTKP the tokens are written into their cells first.
        exact: whether the bits may not depend on how tokens are split into calls.
    """
    G, dims = H // K, (("P", P), ("G", H // K))
    cells, shares = (fitted(config("attention", arch, dtype_name(dtype), name, dims), P) for name in ("cells", "shares"))
    # Where bits count, all tiles are those of many tokens.
    chosen = regime(T, cached, cells["BLOCK_R"] // _heads(G, cells) if exact else _rows(G, shares) // G, exact)
    build, values = {"cells": (_cells, cells), "shares": (_shares, shares), "chunks": (_chunks, cells), "walk": (_walk, cells)}[chosen]
    made, outer = build(B, T, H, K, A, P, L, scoring, cached, values, dict(strides)), dict(strides)
    return Plan((_write(B, T, K, P, L, outer), *made.launches), made.scratch) if "new_k" in outer else made


def _write(B: int, T: int, K: int, P: int, L: int, strides: Mapping[str, tuple[int, ...]]) -> Launch:
    outer = tuple(stride for name in ("new_k", "new_v", "k", "v") for stride in strides[name][:3])
    constants = {"P": P, "BLOCK_P": block_of(P), "BLOCK_T": WRITTEN}
    return Launch(kernels.write_cells, (blocks(T, WRITTEN), K, B), ("new_k", "new_v", "k", "v", "position", *outer, T, L), constants)


@lru_cache(maxsize=1024)
def planned(layout: Layout, scoring: str, exact: bool, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan of a call by its tensors' layout, k_BKLP and v_BKLP: a step looks up what one before it has made."""
    shapes = {name: shape for name, shape, _ in layout}
    outer = {name: strides_of(shape, stride) for name, shape, stride in layout}
    for name in "kv":
        b, k, cell, p = outer[name]
        outer[name] = (b, cell, k, p)  # as tokens have them
    (B, T, H, P), (K, L) = shapes["q"], shapes["k"][1:3]
    A = shapes["score"][1] if "score" in shapes else 1
    if "score" in outer and "position" not in shapes:
        outer["score"] = scores_of_tokens(*outer["score"])
    return plan(B, T, H, K, A, P, L, scoring, "position" in shapes, dtype, architecture(device), tuple(outer.items()), exact)


def scores_of_tokens(b: int, a: int, n: int) -> tuple[int, int, int]:
    """Strides of scores that lie as tokens do: the last of a single token, which nobody takes, must not have a kernel compiled for it."""
    return b, a, n or b


def _outer(strides: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    return *strides["q"][:3], *strides["k"][:3], *strides["v"][:3], *strides.get("score", (0, 0, 0))


def _tensors(scoring: str, cached: bool) -> tuple[str, str, str, str, str]:
    # What is not there is named after another tensor; no kernel reads it.
    return "q", "k", "v", "score" if scoring != "none" else "q", "position" if cached else "q"


def _heads(G: int, values: Mapping[str, Any]) -> int:
    """Of a tile, which has BLOCK_R // heads queries."""
    return min(G, values["BLOCK_R"])


def _tile(H: int, K: int, A: int, P: int, scoring: str, cached: bool, values: Mapping[str, Any]) -> dict[str, Any]:
    R, N, heads = values["BLOCK_R"], values["BLOCK_N"], _heads(H // K, values)
    if scoring != "none" and not (A <= K and K % A == 0):
        N = max(16, N // 2)  # heads that share keys have scores of their own, which fill a tile too
    return {
        "H": H, "K": K, "A": A, "P": P, "BLOCK_P": block_of(P), "HEADS": heads, "QUERIES": R // heads, "BLOCK_R": R,
        "BLOCK_N": N, "SCALE": P**-0.5, "SCORING": scoring, "HAS_POSITION": cached,
    }  # fmt: skip


def _cells(
    B: int, T: int, H: int, K: int, A: int, P: int, L: int, scoring: str, cached: bool, values: Mapping[str, Any],
    strides: Mapping[str, tuple[int, ...]]
) -> Plan:  # fmt: skip
    constants = _tile(H, K, A, P, scoring, cached, values)
    grid = (blocks(T, constants["QUERIES"]), K * blocks(H // K, constants["HEADS"]), B)
    arguments: tuple[str | int, ...] = (*_tensors(scoring, cached), "out", *_outer(strides), T, L)
    return Plan((Launch(kernels.attend_cells, grid, arguments, constants, values["num_warps"], values["num_stages"]),))


def _walk(
    B: int, T: int, H: int, K: int, A: int, P: int, L: int, scoring: str, cached: bool, values: Mapping[str, Any],
    strides: Mapping[str, tuple[int, ...]]
) -> Plan:  # fmt: skip
    constants = {**_tile(H, K, A, P, scoring, cached, values), "CHUNK": values["chunk"], "APART": False}
    grid = (blocks(T, constants["QUERIES"]), K * blocks(H // K, constants["HEADS"]), B)
    arguments: tuple[str | int, ...] = (*_tensors(scoring, cached), "q", "q", "out", *_outer(strides), T, L, blocks(L, values["chunk"]))
    return Plan((Launch(in_chunks.attend_chunks, grid, arguments, constants, values["num_warps"], values["num_stages"]),))


def _chunks(
    B: int, T: int, H: int, K: int, A: int, P: int, L: int, scoring: str, cached: bool, values: Mapping[str, Any],
    strides: Mapping[str, tuple[int, ...]]
) -> Plan:  # fmt: skip
    constants, chunks = {**_tile(H, K, A, P, scoring, cached, values), "CHUNK": values["chunk"], "APART": True}, blocks(L, values["chunk"])
    arguments: tuple[str | int, ...] = (*_tensors(scoring, cached), "acc", "tops", "q", *_outer(strides), T, L, chunks)
    grid = (chunks, K * blocks(H // K, constants["HEADS"]), B)
    attend = Launch(in_chunks.attend_chunks, grid, arguments, constants, values["num_warps"], values["num_stages"])
    of_row = {"H": H, "P": P, "BLOCK_P": block_of(P), "CHUNK": values["chunk"]}
    join = Launch(in_chunks.join_chunks, (T, H, B), ("acc", "tops", "position", "out", T, L, chunks), of_row, 1, 2)
    scratch = {"acc": Scratch((B, chunks, T, H, P), torch.float32), "tops": Scratch((B, chunks, T, H, 2), torch.float32)}
    return Plan((attend, join), scratch)


def _rows(G: int, values: Mapping[str, Any]) -> int:
    """Of a tile of a share: the same for all numbers of tokens, which then share a compilation."""
    return max(values["rows"], block_of(G))


def _shares(
    B: int, T: int, H: int, K: int, A: int, P: int, L: int, scoring: str, cached: bool, values: Mapping[str, Any],
    strides: Mapping[str, tuple[int, ...]]
) -> Plan:  # fmt: skip
    G, N = H // K, values["BLOCK_N"]
    R = _rows(G, values)
    shares = shares_of(B * K, values["programs"], least(MOST_SHARES, most(1, L // N)))
    dims = {"H": H, "K": K, "P": P, "BLOCK_P": block_of(P), "BLOCK_R": R}
    partial = Launch(
        kernels.attend_some_cells,
        (shares, K, B),
        (*_tensors(scoring, cached), "acc", "tops", *_outer(strides), T, L),
        {**dims, "A": A, "BLOCK_N": N, "SCALE": P**-0.5, "SCORING": scoring},
        values["num_warps"],
        values["num_stages"],
    )
    combine = Launch(kernels.combine_shares, (T, H, B), ("acc", "tops", "out", T), {**dims, "SHARES": shares}, 4, 1)
    scratch = {
        "acc": Scratch((B, K, shares, R, P), torch.float32),
        "tops": Scratch((B, K, shares, 2, R), torch.float32),
    }
    return Plan((partial, combine), scratch)
