"""How `rope` becomes launches."""

from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.rope.plan import plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    sizes, strides = call.dims("BTHPF"), (call.strides("x_BTHP", 3), call.strides("cos_BTF", 2), call.strides("sin_BTF", 2))
    return uncached(plan)(*sizes, call.dtypes["x_BTHP"], *strides, call.arch)


NATIVE = Native(
    "rope",
    _plan,
    (Output("y_BTHP", "x_BTHP"),),
    names={"y_MHP": "y_BTHP"},
    rows={"rope_kernel": Rows("F", ("BLOCK_M", "BLOCK_H", "BLOCK_F"))},
)
