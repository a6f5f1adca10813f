"""`rope` by a Triton kernel. B batch, T tokens, H heads, P head dimension, F rotated pairs."""

import torch
from torch import Tensor

from wm_kernels.rope.plan import plan
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous


def rope_triton(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> Tensor:
    """See `rope_reference`; float32, float16 or bfloat16. Heads whose entries do not follow each other are copied first."""
    (B, T, H, P), F = x_BTHP.shape, cos_BTF.shape[-1]
    x_BTHP, cos_BTF, sin_BTF = (inner_contiguous(tensor) for tensor in (x_BTHP, cos_BTF, sin_BTF))
    y_BTHP = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=x_BTHP.device)
    found = strides(x_BTHP)[:3], strides(cos_BTF)[:2], strides(sin_BTF)[:2]
    run(
        plan(B, T, H, P, F, x_BTHP.dtype, *found, architecture(x_BTHP.device)),
        {"x_BTHP": x_BTHP, "cos_BTF": cos_BTF, "sin_BTF": sin_BTF, "y_MHP": y_BTHP},
    )
    return y_BTHP
