"""A kernel that writes one element past the end of its scratch, with another one behind it: what memcheck must see in a plan's launches."""

import torch
import triton
import triton.language as tl

from wm_kernels.triton_launch import Launch, Plan, Scratch

COUNT = 12


@triton.jit
def one_too_many(out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, at.to(tl.float32), mask=at <= COUNT)


PLAN = Plan(
    (Launch(one_too_many, (1,), ("small",), {"COUNT": COUNT, "BLOCK": 16}, 1, 1),),
    {"small": Scratch((COUNT,), torch.float32), "behind": Scratch((COUNT,), torch.float32)},
)
