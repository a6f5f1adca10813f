"""Launches of residual_rms_norm. M rows, D model."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.residual_rms_norm.triton_kernel import residual_rms_norm_kernel
from wm_kernels.symbolic import least
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

WIDEST = 16384  # columns held at once; wider rows are read twice


def regime(D: int) -> str:
    """Rows of more than `WIDEST` columns are `wide`. The number of rows decides nothing: the bits of one do not depend on the others."""
    return "wide" if D > WIDEST else "rows"


@lru_cache(maxsize=1024)
def plan(
    M: int, D: int, dtype: torch.dtype, eps: float, has_scale: bool, x_stride: int, residual_stride: int, arch: str, **override: Any
) -> Plan:
    """One launch; tensors x_MD, residual_MD, scale_D (a stand-in without a scale), weight_D, normed_MD, sum_MD."""
    values = override or config("residual_rms_norm", arch, dtype_name(dtype), regime(D), (("D", D),))
    rows = values["rows"]
    constants = {"D": D, "EPS": eps, "HAS_SCALE": has_scale, "ROWS": rows, "BLOCK_D": min(power_of_two(D), WIDEST)}
    constants["DEPENDENT"] = can_wait(arch)
    arguments = ("x_MD", "residual_MD", "scale_D", "weight_D", "normed_MD", "sum_MD", M, x_stride, residual_stride)
    grid = (least(blocks(M, rows), values["programs"]),)
    return Plan((Launch(residual_rms_norm_kernel, grid, arguments, constants, values["num_warps"], 1),))
