"""Launches of rope. B batch, T tokens, H heads, P head dimension, F rotated pairs."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.rope.triton_kernel import rope_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, dtype_name, power_of_two


def regime(M: int) -> str:
    """`few` tokens have a program each, `many` share."""
    return "few" if M <= 256 else "many"


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    H: int,
    P: int,
    F: int,
    dtype: torch.dtype,
    x_strides: tuple[int, ...],
    cos_strides: tuple[int, ...],
    sin_strides: tuple[int, ...],
    arch: str,
    **override: Any,
) -> Plan:
    """One launch; tensors x_BTHP, cos_BTF, sin_BTF, y_MHP."""
    values = override or config("rope", arch, dtype_name(dtype), regime(B * T), (("H", H), ("P", P)))
    block_H = min(values["block_H"], power_of_two(H))
    constants = {
        "H": H,
        "P": P,
        "F": F,
        "BLOCK_M": values["block_M"],
        "BLOCK_H": block_H,
        "BLOCK_F": power_of_two(F),
        "BLOCK_REST": power_of_two(max(1, P - 2 * F)),
    }
    names = ("x_BTHP", "cos_BTF", "sin_BTF", "y_MHP")
    grid = (blocks(B * T, values["block_M"]), blocks(H, block_H))
    return Plan((Launch(rope_kernel, grid, (*names, B * T, T, *x_strides, *cos_strides, *sin_strides), constants, values["num_warps"], 1),))
