"""Launches of product_key_topk. B batch, T tokens, R retrieval heads, d half a query's width, J sub-keys per half, k picks."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.product_key_topk.triton_kernel import product_key_topk_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, dtype_name, power_of_two

WIDEST = 1024  # sub-keys whose scores are held at once
MANY_SLOTS = 128  # more pairs than this take tiles of the fewest tokens, or they do not fit in registers
KEY_BYTES = 2**17  # of sub-keys held at once, in shared memory


def regime(M: int) -> str:
    """`few` tokens do not fill the machine with full tiles."""
    return "few" if M <= 512 else "many"


def slots(k: int) -> int:
    """Pairs of ranks that the kernel looks at: those that can win, and one more of every row."""
    return sum(min(k // (row + 1) + 1, k) for row in range(k))


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
    **override: Any,
) -> Plan:
    """One launch; tensors query_BTR2d, keys_RJ2d, weight_MRk, expert_MRk."""
    values = override or config("product_key_topk", arch, dtype_name(dtype), regime(B * T), (("J", J), ("d", d), ("k", k)))
    block_M = values["block_M"] if slots(k) <= MANY_SLOTS else 16
    block_d = max(16, power_of_two(d))
    block_J = min(WIDEST, power_of_two(J), KEY_BYTES // (block_d * dtype.itemsize))
    constants = {
        "R": R,
        "d": d,
        "J": J,
        "k": k,
        "BLOCK_M": block_M,
        "BLOCK_d": block_d,
        "BLOCK_J": max(16, block_J),
        "K": power_of_two(k),
        "SLOTS": power_of_two(slots(k)),
        "INTERPRETED": arch == "interpreter",
    }
    names = ("query_BTR2d", "keys_RJ2d", "weight_MRk", "expert_MRk")
    grid = (blocks(B * T, block_M), R)
    return Plan(
        (Launch(product_key_topk_kernel, grid, (*names, B * T, T, *query_strides, *keys_strides), constants, values["num_warps"], 1),)
    )
