"""`rope` by a Triton kernel. B batch, T tokens, H heads, P head dimension, F rotated pairs."""

from collections.abc import Callable, Mapping

from torch import Tensor

from wm_kernels.rope.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run, strides

_known: dict[tuple[object, ...], Known] = {}


def rope_triton(x_BTHP: Tensor, cos_BTF: Tensor, sin_BTF: Tensor, check: Callable[[], None] | None = None) -> Tensor:
    """See `rope_reference`; float32, float16 or bfloat16. Heads whose entries do not follow each other are copied first.

    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    given = {"x_BTHP": x_BTHP, "cos_BTF": cos_BTF, "sin_BTF": sin_BTF}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x, cos, sin = ready.values()
        outer = strides(x)[:3], strides(cos)[:2], strides(sin)[:2]
        return plan(*x.shape, cos.shape[-1], x.dtype, *outer, architecture(x.device))

    made = known_plan(_known, call_key(x_BTHP, cos_BTF, sin_BTF), given, make, check)
    y_BTHP = x_BTHP.new_empty(x_BTHP.shape)
    run(made, {**given, "y_MHP": y_BTHP})
    return y_BTHP
