"""`residual_rms_norm` by a Triton kernel."""

from collections.abc import Callable, Mapping

from torch import Tensor

from wm_kernels.residual_rms_norm.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run
from wm_kernels.triton_support import row_stride, same_rows

_known: dict[tuple[object, ...], Known] = {}


def residual_rms_norm_triton(
    x_MD: Tensor, residual_MD: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float, check: Callable[[], None] | None = None
) -> tuple[Tensor, Tensor]:
    """See `residual_rms_norm_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first.

    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    x_MD, residual_MD = same_rows(x_MD), same_rows(residual_MD)
    # Without a scale something stands in for it.
    given = {"x_MD": x_MD, "residual_MD": residual_MD, "scale_D": weight_D if scale_D is None else scale_D, "weight_D": weight_D}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x, residual = ready["x_MD"], ready["residual_MD"]
        return plan(*x.shape, x.dtype, eps, scale_D is not None, row_stride(x), row_stride(residual), architecture(x.device))

    made = known_plan(_known, (eps, *call_key(x_MD, residual_MD, scale_D, weight_D)), given, make, check)
    normed_MD, sum_MD = x_MD.new_empty(x_MD.shape), x_MD.new_empty(x_MD.shape)
    run(made, {**given, "normed_MD": normed_MD, "sum_MD": sum_MD})
    return normed_MD, sum_MD
