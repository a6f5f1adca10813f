"""Launches of rope_angles. B batch, T tokens, F rotated pairs."""

import math
from functools import lru_cache
from typing import Any

from wm_kernels.rope_angles.triton_kernel import rope_angles_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, power_of_two


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    F: int,
    theta: float,
    scaling: str,
    factor: float,
    original: int,
    low: float,
    high: float,
    arch: str,
    **override: Any,
) -> Plan:
    """One launch; tensors position_BT, length_B (a stand-in but for dynamic scaling), cos_BTF, sin_BTF."""
    values = override or config("rope_angles", arch, "float32", "tokens", (("F", F),))
    block_F = power_of_two(F)
    block_M = max(1, values["elements"] // block_F)
    constants = {"F": F, "LOG2_THETA": math.log2(theta), "SCALING": scaling, "FACTOR": float(factor), "ORIGINAL": original}
    constants |= {"LOW": float(low), "HIGH": float(high), "BLOCK_M": block_M, "BLOCK_F": block_F}
    arguments = ("position_BT", "length_B", "cos_BTF", "sin_BTF", B * T, T)
    return Plan((Launch(rope_angles_kernel, (blocks(B * T, block_M),), arguments, constants, values["num_warps"], 1),))
