"""Launches of expert_mix. B batch, T tokens, M = B*T, D model, E experts, Q picks of one token, S slices of D."""

from functools import lru_cache
from typing import Any

import torch

from wm_kernels.expert_mix.triton_kernel import expert_hidden_kernel, expert_inner_kernel, expert_outer_kernel, expert_spread_kernel
from wm_kernels.triton_configs import config
from wm_kernels.triton_launch import Launch, Plan, Scratch
from wm_kernels.triton_support import blocks, can_wait, dtype_name, power_of_two

HIDDEN_BLOCK = 1024
EXPERTS_PER_PICK, LEAST_PICKS = 32, 64  # with which products with all experts are faster than reading the picked rows
PRODUCT_TOKENS = 1024  # no more of them do not fill the machine with products
PRODUCT_BYTES = 2**25  # of products held at once, so that they stay in the L2 cache
ALIGNMENT = 8  # entries: torch's products are slow on rows that are not a multiple of 16 bytes


def regime(M: int) -> str:
    """The picks of `few` tokens touch each expert less than about once; `many` share its rows."""
    return "few" if M <= 1024 else "many"


def serves_products(M: int, D: int, E: int, Q: int, dtype: torch.dtype) -> bool:
    """Whether products with all experts serve: in bfloat16 alone, as float16 may not hold a hidden value that float32 does."""
    aligned = D % ALIGNMENT == 0 and E % ALIGNMENT == 0
    return dtype == torch.bfloat16 and aligned and M > PRODUCT_TOKENS and Q >= LEAST_PICKS and E <= EXPERTS_PER_PICK * Q


def products_at_once(E: int) -> int:
    """Tokens whose products are held at once."""
    return max(128, PRODUCT_BYTES // (4 * power_of_two(E)))


@lru_cache(maxsize=1024)
def plan(
    B: int,
    T: int,
    D: int,
    Q: int,
    dtype: torch.dtype,
    activation: str,
    weight_inside: bool,
    x_strides: tuple[int, int],
    down_stride: int,
    up_stride: int,
    arch: str,
    exact: bool = False,
    **override: Any,
) -> Plan:
    """Two launches, three where D is cut for the products with `down`; tensors x_BTD, expert_MQ, weight_MQ, down_ED, up_ED, y_MD."""
    values = override or config("expert_mix", arch, dtype_name(dtype), "few" if exact else regime(B * T), (("D", D), ("Q", Q)))
    M, widest = B * T, power_of_two(D)
    inner_D, outer_D = min(values["inner_D"], widest), min(values["outer_D"], widest)
    S, picks = blocks(D, inner_D), min(values["picks"], power_of_two(Q))
    scratch = {"hidden": Scratch((M, Q), torch.float32)}
    if S > 1:
        scratch["inner"] = Scratch((S, M, Q), torch.float32)
    hidden, early = {"ACTIVATION": activation, "WEIGHT_INSIDE": weight_inside}, {"DEPENDENT": can_wait(arch)}
    inner = Launch(
        expert_inner_kernel,
        (blocks(M, values["inner_tokens"]), S, blocks(Q, picks)),
        ("x_BTD", "expert_MQ", "weight_MQ", "down_ED", "inner" if S > 1 else "hidden", M, T, *x_strides, down_stride),
        {"D": D, "Q": Q, **hidden, "FINISH": S == 1, "TOKENS": values["inner_tokens"], "PICKS": picks}
        | {"BLOCK_Q": min(values["inner_Q"], picks), "BLOCK_D": inner_D, **early},
        values["inner_warps"],
        1,
    )
    finish = Launch(
        expert_hidden_kernel,
        (blocks(M * Q, HIDDEN_BLOCK),),
        ("inner", "weight_MQ", "hidden", M * Q),
        {"S": S, **hidden, "BLOCK": HIDDEN_BLOCK, **early},
        4,
        1,
    )
    outer = Launch(
        expert_outer_kernel,
        (blocks(M, values["outer_tokens"]), blocks(D, outer_D)),
        ("expert_MQ", "hidden", "up_ED", "y_MD", M, up_stride),
        {"D": D, "Q": Q, "TOKENS": values["outer_tokens"], "BLOCK_Q": min(values["outer_Q"], power_of_two(Q)), "BLOCK_D": outer_D} | early,
        values["outer_warps"],
        1,
    )
    return Plan((inner, finish, outer) if S > 1 else (inner, outer), scratch)


@lru_cache(maxsize=1024)
def spread_plan(M: int, E: int, Q: int, dtype: torch.dtype, activation: str, weight_inside: bool, arch: str, **override: Any) -> Plan:
    """One launch, between the products; tensors inner_ME, expert_MQ, weight_MQ, hidden_ME, rest_ME."""
    values = override or config("expert_mix", arch, dtype_name(dtype), "products", (("E", E), ("Q", Q)))
    constants = {"E": E, "Q": Q, "ACTIVATION": activation, "WEIGHT_INSIDE": weight_inside}
    constants |= {"BLOCK_Q": min(values["block_Q"], power_of_two(Q)), "BLOCK_E": min(values["block_E"], power_of_two(E))}
    arguments = ("inner_ME", "expert_MQ", "weight_MQ", "hidden_ME", "rest_ME", M)
    return Plan((Launch(expert_spread_kernel, (M,), arguments, constants, values["num_warps"], 1),))
