"""Launches of router_topk. M tokens, E experts, k picks."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.router_topk.triton_kernel import router_topk_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan
from wm_kernels.triton_support import blocks, dtype_name, power_of_two

WIDEST = 8192  # experts whose logits are held at once; more are the reference's


def regime(M: int, E: int) -> str:
    """`narrow` rows fit in the registers of one warp, several at once; of `few` tokens each has a program of its own."""
    if E > 1024:
        return "wide"
    return "few" if M <= 512 else "narrow"


@lru_cache(maxsize=1024)
def plan(M: int, E: int, k: int, dtype: torch.dtype, normalize: bool, stride: int, arch: str, exact: bool = False, **override: Any) -> Plan:
    """One launch; tensors logits_ME, weight_Mk, expert_Mk."""
    values = override or config("router_topk", arch, dtype_name(dtype), regime(1 if exact else M, E), (("E", E), ("k", k)))
    block_E = power_of_two(E)
    block_M = max(1, values["elements"] // block_E)
    constants = {"E": E, "k": k, "NORMALIZE": normalize, "BLOCK_M": block_M, "BLOCK_E": block_E, "K": power_of_two(k)}
    arguments = ("logits_ME", "weight_Mk", "expert_Mk", M, stride)
    return Plan((Launch(router_topk_kernel, (blocks(M, block_M),), arguments, constants, values["num_warps"], 1),))
