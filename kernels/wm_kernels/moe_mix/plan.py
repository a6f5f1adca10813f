"""Launches around the grouped products of moe_mix, of few tokens, and of many by kernels alone.

M tokens   k picks   N = M k   E experts   D model   I inner width
"""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.moe_mix import triton_tiles as tiles
from wm_kernels.moe_mix.triton_kernel import moe_combine_kernel, moe_hidden_kernel, moe_pick_hidden_kernel, moe_pick_outer_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, dtype_name, power_of_two

SEGMENT, SOME = 256, 32  # picks that a program sorts, and how many it compares with or counts at once
MOST_CELLS = 4096  # of a tile of counts
MANY = 32  # picks of an expert, on average, from which tiles are large
LEAST = 16  # a product's sides


@lru_cache(maxsize=1024)
def hidden_plan(N: int, I: int, dtype: torch.dtype, gated: bool, has_bias: bool, activation: str, arch: str, **override: Any) -> Plan:
    """One launch; tensors inner_NF, in_bias_EF, expert_N, hidden_NI."""
    values = override or config("moe_mix", arch, dtype_name(dtype), "hidden", (("I", I),))
    block_I = min(values["block"], power_of_two(I))
    block_N = max(1, values["block"] // block_I)
    constants = {"I": I, "GATED": gated, "HAS_BIAS": has_bias, "ACTIVATION": activation, "BLOCK_N": block_N, "BLOCK_I": block_I}
    grid = (blocks(N, block_N), blocks(I, block_I))
    arguments = ("inner_NF", "in_bias_EF", "expert_N", "hidden_NI", N)
    return Plan((Launch(moe_hidden_kernel, grid, arguments, constants, values["num_warps"], 1),))


@lru_cache(maxsize=1024)
def combine_plan(M: int, k: int, D: int, dtype: torch.dtype, has_bias: bool, arch: str, **override: Any) -> Plan:
    """One launch; tensors out_ND, out_bias_ED, expert_Mk, weight_Mk, place_Mk, y_MD."""
    values = override or config("moe_mix", arch, dtype_name(dtype), "combine", (("D", D), ("k", k)))
    block_D = min(values["block"], power_of_two(D))
    constants = {"D": D, "k": k, "HAS_BIAS": has_bias, "BLOCK_D": block_D}
    arguments = ("out_ND", "out_bias_ED", "expert_Mk", "weight_Mk", "place_Mk", "y_MD", M)
    return Plan((Launch(moe_combine_kernel, (M, blocks(D, block_D)), arguments, constants, values["num_warps"], 1),))


@lru_cache(maxsize=1024)
def picks_plan(
    M: int,
    k: int,
    D: int,
    I: int,
    dtype: torch.dtype,
    gated: bool,
    biases: tuple[bool, bool],
    activation: str,
    x_stride: int,
    in_strides: tuple[int, int],
    out_strides: tuple[int, int],
    bias_strides: tuple[int, int],
    arch: str,
    **override: Any,
) -> Plan:
    """Two launches; tensors x_MD, expert_N, weight_N, in_EFD, in_bias_EF, out_EDI, out_bias_ED, y_MD. `biases` tells which are given."""
    values = override or config("moe_mix", arch, dtype_name(dtype), "picks", (("D", D), ("I", I), ("k", k)))
    rows, columns_D, columns_I = values["rows"], min(values["columns"], power_of_two(D)), min(values["columns"], power_of_two(I))
    # 16 bytes a thread: warps without rows of their own would do those of others again.
    at_once = 32 * 16 // dtype.itemsize
    warps_D, warps_I = (max(1, min(values["num_warps"], rows * columns // at_once)) for columns in (columns_D, columns_I))
    shared = {"D": D, "I": I, "k": k}
    hidden = Launch(
        moe_pick_hidden_kernel,
        (M * k, blocks(I, rows)),
        ("x_MD", "expert_N", "in_EFD", "in_bias_EF", "hidden", x_stride, *in_strides, bias_strides[0]),
        shared | {"GATED": gated, "HAS_BIAS": biases[0], "ACTIVATION": activation} | {"BLOCK_I": rows, "BLOCK_D": columns_D},
        warps_D,
        values["num_stages"],
    )
    outer = Launch(
        moe_pick_outer_kernel,
        (M, blocks(D, rows)),
        ("hidden", "expert_N", "weight_N", "out_EDI", "out_bias_ED", "y_MD", *out_strides, bias_strides[1]),
        shared | {"HAS_BIAS": biases[1], "BLOCK_I": columns_I, "BLOCK_D": rows},
        warps_I,
        values["num_stages"],
    )
    return Plan((hidden, outer), {"hidden": Scratch((M * k, I), torch.float32)})


@lru_cache(maxsize=1024)
def tiles_plan(
    M: int,
    k: int,
    E: int,
    D: int,
    I: int,
    dtype: torch.dtype,
    gated: bool,
    biases: tuple[bool, bool],
    activation: str,
    x_stride: int,
    in_strides: tuple[int, int],
    out_strides: tuple[int, int],
    bias_strides: tuple[int, int],
    arch: str,
    **override: Any,
) -> Plan:
    """Six launches: three sort the picks by expert, two multiply, one sums; tensors as those of `picks_plan`."""
    N = M * k
    values = override or config("moe_mix", arch, dtype_name(dtype), "tiles" if MANY * E <= N else "thin", (("D", D), ("I", I), ("E", E)))
    of_all = {"E": E, "BLOCK_E": power_of_two(E), "BLOCK_R": values["BLOCK_R"], "PRECISION": "ieee"}
    columns = values["BLOCK_N"] // 2 if gated else values["BLOCK_N"]
    # Every expert has at most one tile that is not full.
    grid, options = N // values["BLOCK_R"] + E, (values["num_warps"], values["num_stages"])
    block_I, block_D = _side(I, columns), _side(D, values["BLOCK_N"])
    hidden = Launch(
        tiles.moe_tile_hidden_kernel,
        (grid, blocks(I, block_I)),
        ("x_MD", "pick", "end", "in_EFD", "in_bias_EF", "hidden", x_stride, *in_strides, bias_strides[0]),
        of_all
        | {"D": D, "I": I, "k": k, "GATED": gated, "HAS_BIAS": biases[0], "ACTIVATION": activation}
        | {"BLOCK_I": block_I, "BLOCK_D": _side(D, values["BLOCK_K"])},
        *options,
    )
    outer = Launch(
        tiles.moe_tile_outer_kernel,
        (grid, blocks(D, block_D)),
        ("hidden", "pick", "end", "weight_N", "out_EDI", "out_bias_ED", "out", *out_strides, bias_strides[1]),
        of_all | {"D": D, "I": I, "HAS_BIAS": biases[1], "BLOCK_D": block_D, "BLOCK_I": _side(I, values["BLOCK_K"])},
        *options,
    )
    block = min(1024, power_of_two(D))
    add = Launch(tiles.moe_sum_kernel, (M, blocks(D, block)), ("out", "y_MD"), {"D": D, "k": k, "BLOCK_D": block}, 4, 1)
    # float16 ends at 65504, which a pick's summand may pass where their sum does not.
    wide = torch.float32 if dtype == torch.float16 else dtype
    scratch = {
        "count": Scratch((blocks(N, SEGMENT), E), torch.int32),
        "end": Scratch((E,), torch.int32),
        "pick": Scratch((N,), torch.int32),
        "hidden": Scratch((N, I), dtype),
        "out": Scratch((N, D), wide),
    }
    return Plan((*sort_plan(N, E).launches, hidden, outer, add), scratch)


def sort_plan(N: int, E: int) -> Plan:
    """Picks by expert, each in their order; tensors expert_N, and count [segments, E], end [E], pick [N] of int32."""
    segments, block_E = blocks(N, SEGMENT), power_of_two(E)
    shared = {"E": E, "SEGMENT": SEGMENT}
    count = Launch(tiles.moe_count_kernel, (segments,), ("expert_N", "count", N), shared | {"BLOCK_E": min(SOME, block_E)}, 4, 1)
    of_counts = {"E": E, "BLOCK_S": max(1, MOST_CELLS // block_E), "BLOCK_E": block_E}
    offset = Launch(tiles.moe_offset_kernel, (1,), ("count", "end", segments), of_counts, 4, 1)
    sort = Launch(tiles.moe_sort_kernel, (segments,), ("expert_N", "count", "pick", N), shared | {"BLOCK": SOME}, 4, 1)
    return Plan((count, offset, sort))


def _side(size: int, block: int) -> int:
    """Of a product's tile along an axis of this size."""
    return max(LEAST, min(block, power_of_two(size)))
