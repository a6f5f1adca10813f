"""Launches of causal_conv1d. B batch, T tokens, C channels, L taps."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.causal_conv1d.triton_kernel import causal_conv1d_kernel
from wm_kernels.symbolic import most
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two


def regime(T: int) -> str:
    """`step`: one token; `tokens`: any other number."""
    return "step" if T == 1 else "tokens"


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    C: int,
    L: int,
    dtype: torch.dtype,
    given: tuple[bool, bool, bool],
    silu: bool,
    x_strides: tuple[int, int],
    weight_stride: int,
    before_strides: tuple[int, int],
    after_strides: tuple[int, int],
    arch: str,
    **override: Any,
) -> Plan:
    """One launch; tensors x_BTC, weight_CL, bias_C, before_BYC, valid_B, y_BTC, after_BYC.

    `given` says whether there are a bias, a state and valid lengths; stand-ins serve for those that are absent.
    """
    values = override or config("causal_conv1d", arch, dtype_name(dtype), regime(T), (("C", C), ("L", L)))
    # Every token that reads the state is in a row's first program, which may write the new state in place.
    block_T = 1 if regime(T) == "step" else max(values["block_T"], power_of_two(L - 1))
    has_bias, has_state, has_valid = given
    block_C = min(values["block_C"], power_of_two(C))
    constants = {
        "C": C,
        "L": L,
        "HAS_BIAS": has_bias,
        "HAS_STATE": has_state,
        "HAS_VALID": has_valid,
        "SILU": silu,
        "BLOCK_T": block_T,
        "BLOCK_C": block_C,
        "DEPENDENT": can_wait(arch),
    }
    names = ("x_BTC", "weight_CL", "bias_C", "before_BYC", "valid_B", "y_BTC", "after_BYC")
    arguments = (*names, T, *x_strides, weight_stride, *before_strides, *after_strides)
    # A row without tokens still hands on its state.
    grid = (blocks(C, block_C) * most(1, blocks(T, block_T)) * B,)
    return Plan((Launch(causal_conv1d_kernel, grid, arguments, constants, values["num_warps"], 1),))
