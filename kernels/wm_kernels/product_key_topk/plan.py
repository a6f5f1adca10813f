"""Launches of product_key_topk. B batch, T tokens, R retrieval heads, d half a query's width, J sub-keys per half, k picks."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.product_key_topk.triton_kernel import product_key_topk_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

TILE = 2**14  # scores held at once: of four warps, 128 registers a thread
KEY_BYTES = 2**17  # of sub-keys held at once, in shared memory


def regime(M: int) -> str:
    """`few` tokens do not fill the machine with full tiles."""
    return "few" if M <= 512 else "many"


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    R: int,
    d: int,
    J: int,
    k: int,
    dtype: torch.dtype,
    query_strides: tuple[int, ...],
    keys_strides: tuple[int, ...],
    arch: str,
    exact: bool = False,
    **override: Any,
) -> Plan:
    """One launch; tensors query_BTR2d, keys_RJ2d, weight_MRk, expert_MRk."""
    chosen = "few" if exact else regime(B * T)
    values = override or config("product_key_topk", arch, dtype_name(dtype), chosen, (("J", J), ("d", d), ("k", k)))
    block_M, block_d = values["block_M"], max(16, power_of_two(d))
    block_J = min(TILE // block_M, power_of_two(J), KEY_BYTES // (block_d * dtype.itemsize))
    constants = {
        "R": R,
        "d": d,
        "J": J,
        "k": k,
        "BLOCK_M": block_M,
        "BLOCK_d": block_d,
        "BLOCK_J": max(16, block_J),
        "K": power_of_two(k),
        "INTERPRETED": arch == "interpreter",
        "DEPENDENT": can_wait(arch),
    }
    names = ("query_BTR2d", "keys_RJ2d", "weight_MRk", "expert_MRk")
    grid = (blocks(B * T, block_M), R)
    return Plan(
        (Launch(product_key_topk_kernel, grid, (*names, B * T, T, *query_strides, *keys_strides), constants, values["num_warps"], 1),)
    )
