"""Launches of gated_rms_norm. M rows, C channels."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.gated_rms_norm.triton_kernel import gated_rms_norm_kernel
from wm_kernels.symbolic import least
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

WIDEST = 16384  # columns held at once; wider rows are read twice


def regime(C: int) -> str:
    """Rows of more than `WIDEST` columns are `wide`. The number of rows decides nothing: the bits of one do not depend on the others."""
    return "wide" if C > WIDEST else "rows"


@lru_cache(maxsize=1024)
def plan(M: int, C: int, dtype: torch.dtype, eps: float, y_stride: int, z_stride: int, arch: str, **override: Any) -> Plan:
    """One launch; tensors y_MC, z_MC, weight_C, out_MC."""
    values = override or config("gated_rms_norm", arch, dtype_name(dtype), regime(C), (("C", C),))
    rows = values["rows"]
    constants = {"C": C, "EPS": eps, "ROWS": rows, "BLOCK_C": min(power_of_two(C), WIDEST), "DEPENDENT": can_wait(arch)}
    arguments = ("y_MC", "z_MC", "weight_C", "out_MC", M, y_stride, z_stride)
    grid = (least(blocks(M, rows), values["programs"]),)
    return Plan((Launch(gated_rms_norm_kernel, grid, arguments, constants, values["num_warps"], 1),))
