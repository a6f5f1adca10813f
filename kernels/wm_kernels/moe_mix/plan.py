"""Launches around the grouped products of moe_mix, and of few tokens. M tokens, k picks, N = M k, D model, I inner width."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.moe_mix.triton_kernel import moe_combine_kernel, moe_hidden_kernel, moe_pick_hidden_kernel, moe_pick_outer_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, dtype_name, power_of_two


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
