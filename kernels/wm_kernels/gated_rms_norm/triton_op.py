"""`gated_rms_norm` by a Triton kernel."""

import torch
from torch import Tensor

from wm_kernels.gated_rms_norm.plan import plan
from wm_kernels.triton_launch import architecture, run
from wm_kernels.triton_support import rows_of


def gated_rms_norm_triton(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """See `gated_rms_norm_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first."""
    (y_MC, y_stride), (z_MC, z_stride) = rows_of(y_MC), rows_of(z_MC)
    out_MC = torch.empty(y_MC.shape, dtype=y_MC.dtype, device=y_MC.device)
    made = plan(*y_MC.shape, y_MC.dtype, eps, y_stride, z_stride, architecture(y_MC.device))
    run(made, {"y_MC": y_MC, "z_MC": z_MC, "weight_C": weight_C.contiguous(), "out_MC": out_MC})
    return out_MC
