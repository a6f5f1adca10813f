"""How `residual_rms_norm` becomes launches."""

from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.residual_rms_norm.plan import plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    M, D = call.dims("MD")
    return uncached(plan)(M, D, call.dtypes["x_MD"], call.plain["eps"], call.given("scale_D"), D, D, call.arch)


NATIVE = Native(
    "residual_rms_norm",
    _plan,
    (Output("normed_MD", "x_MD"), Output("sum_MD", "x_MD")),
    names={"scale_D": ("scale_D", "weight_D")},
    rows={"residual_rms_norm_kernel": Rows("D", ("ROWS", "BLOCK_D"))},
)
