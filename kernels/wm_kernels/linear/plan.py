"""Launches of linear. M rows, K inputs, A, B, C, H widths of the parts."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from wm_kernels.linear.triton_kernel import few_rows_kernel, tiles_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

REGIMES = ("row", "rows", "narrow", "tiles")
DOWN = 65535  # programs along any axis of a grid but the first
ARGUMENTS = ("x_MK", "weight_NK", "bias_N", "step_bias_H", "a_MA", "b_MB", "c_MC", "dt_MH")


@dataclass(frozen=True)
class LinearCall:
    """What decides the launches of one call.

    Attributes:
        dtype: of x, the weight, the bias and all parts but the last.
        parts: widths A, B, C, H.
        exact: every row's bits are those of that row alone.
    """

    arch: str
    dtype: torch.dtype
    M: int
    K: int
    parts: tuple[int, int, int, int]
    gated: bool
    has_bias: bool
    has_step_bias: bool
    exact: bool = False


def regime(call: LinearCall) -> str:
    """How a call is run, from integers alone.

    Returns:
        `row` and `rows`: each program multiplies a few outputs' weights with one row, or with a few. The others: products of tiles on
        tensor cores, `narrow` ones, which are enough for the device where rows are few, or large `tiles`.
    """
    if call.exact or call.M == 1:
        return "row"
    if values(call, "rows")["up_to"] >= call.M:
        return "rows"
    return "narrow" if values(call, "narrow")["up_to"] >= call.M else "tiles"


def values(call: LinearCall, name: str) -> Any:
    """The configuration of a regime; `GATED` is 1 where two weights make one output."""
    outputs = sum(call.parts)
    return config("linear", call.arch, dtype_name(call.dtype), name, (("K", call.K), ("N", outputs), ("GATED", int(call.gated))))


@lru_cache(maxsize=1024)
def plan(call: LinearCall, name: str = "") -> Plan:
    """One launch; stand-ins, never read, take the places of absent biases. Benchmarks name a regime that is not the call's own."""
    name = name or regime(call)
    chosen = values(call, name)
    constants: dict[str, Any] = {
        "GATED": call.gated,
        "HAS_BIAS": call.has_bias,
        "HAS_STEP_BIAS": call.has_step_bias,
        "DEPENDENT": can_wait(call.arch),
    }
    sizes: tuple[int, ...] = (call.M, call.K, *call.parts)
    # Of few rows a program asks for so many weights at once that all together keep the memory busy.
    block_K = min(power_of_two(call.K), chosen["BLOCK_K"])
    block_N = min(chosen["BLOCK_N"], max(1, chosen["weights"] // block_K)) if name in ("row", "rows") else chosen["BLOCK_N"]
    tiles_n = blocks(sum(call.parts), block_N)
    if name in ("row", "rows"):
        constants |= {"K": call.K, "BLOCK_K": block_K, "ROWS": chosen["ROWS"], "BLOCK_N": block_N}
        kernel, sizes, down = few_rows_kernel, (call.M, *call.parts), blocks(call.M, chosen["ROWS"])
        # Exact mode alone takes many rows this way.
        grid = (tiles_n, DOWN, blocks(down, DOWN)) if call.exact and down > DOWN else (tiles_n, down, 1)
    else:
        tile = {key: chosen[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
        constants |= tile | {"EVEN": call.K % chosen["BLOCK_K"] == 0}
        kernel, grid = tiles_kernel, (blocks(call.M, chosen["BLOCK_M"]) * tiles_n, 1, 1)
    return Plan((Launch(kernel, grid, (*ARGUMENTS, *sizes), constants, chosen["num_warps"], chosen["num_stages"]),))
