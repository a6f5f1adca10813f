"""`residual_rms_norm` by a Triton kernel."""

import torch
from torch import Tensor

from wm_kernels.residual_rms_norm.plan import plan
from wm_kernels.triton_launch import architecture, run
from wm_kernels.triton_support import rows_of


def residual_rms_norm_triton(
    x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `residual_rms_norm_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first."""
    (x_MD, x_stride), (residual_MD, residual_stride) = rows_of(x_MD), rows_of(residual_MD)
    normed_MD, sum_MD = (torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device) for _ in range(2))
    made = plan(*x_MD.shape, x_MD.dtype, eps, scale_D is not None, x_stride, residual_stride, architecture(x_MD.device))
    tensors = {
        "x_MD": x_MD,
        "residual_MD": residual_MD,
        "scale_D": weight_D if scale_D is None else scale_D.contiguous(),
        "weight_D": weight_D.contiguous(),
        "normed_MD": normed_MD,
        "sum_MD": sum_MD,
    }
    run(made, tensors)
    return normed_MD, sum_MD
