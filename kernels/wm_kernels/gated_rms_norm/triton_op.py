"""`gated_rms_norm` by a Triton kernel."""

from collections.abc import Callable, Mapping

from torch import Tensor

from wm_kernels.gated_rms_norm.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run
from wm_kernels.triton_support import row_stride, same_rows

_known: dict[tuple[object, ...], Known] = {}


def gated_rms_norm_triton(y_MC: Tensor, z_MC: Tensor, weight_C: Tensor, eps: float, check: Callable[[], None] | None = None) -> Tensor:
    """See `gated_rms_norm_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first.

    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    y_MC, z_MC = same_rows(y_MC), same_rows(z_MC)
    given = {"y_MC": y_MC, "z_MC": z_MC, "weight_C": weight_C}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        y, z = ready["y_MC"], ready["z_MC"]
        return plan(*y.shape, y.dtype, eps, row_stride(y), row_stride(z), architecture(y.device))

    made = known_plan(_known, (eps, *call_key(y_MC, z_MC, weight_C)), given, make, check)
    out_MC = y_MC.new_empty(y_MC.shape)
    run(made, {**given, "out_MC": out_MC})
    return out_MC
