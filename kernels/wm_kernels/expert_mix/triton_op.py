"""`expert_mix` by Triton kernels. B batch, T tokens, D model, E experts, R retrieval heads, k picks, Q = R*k."""

import torch
from torch import Tensor

from wm_kernels.expert_mix.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous


def expert_mix_triton(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    """See `expert_mix_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first."""
    (B, T, D), Q = x_BTD.shape, expert_BTRk.shape[2] * expert_BTRk.shape[3]
    x_BTD, down_ED, up_ED = (inner_contiguous(tensor) for tensor in (x_BTD, down_ED, up_ED))
    y_BTD = torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=x_BTD.device)
    x_strides = strides(x_BTD)
    made = plan(
        B,
        T,
        D,
        Q,
        x_BTD.dtype,
        activation,
        weight_inside,
        (x_strides[0], x_strides[1]),
        strides(down_ED)[0],
        strides(up_ED)[0],
        architecture(x_BTD.device),
    )
    tensors = {
        "x_BTD": x_BTD,
        "expert_MQ": expert_BTRk.contiguous(),
        "weight_MQ": weight_BTRk.contiguous(),
        "down_ED": down_ED,
        "up_ED": up_ED,
        "y_MD": y_BTD,
    }
    run(made, tensors)
    return y_BTD
