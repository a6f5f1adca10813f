"""How `gated_rms_norm` becomes launches."""

from wm_kernels.gated_rms_norm.plan import plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    M, C = call.dims("MC")
    return uncached(plan)(M, C, call.dtypes["y_MC"], call.plain["eps"], C, C, call.arch)


NATIVE = Native("gated_rms_norm", _plan, (Output("out_MC", "y_MC"),), rows={"gated_rms_norm_kernel": Rows("C", ("ROWS", "BLOCK_C"))})
