"""How `linear` becomes launches."""

import torch

from wm_kernels.linear.plan import LinearCall, plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan

WIDTHS = ("A", "B", "C", "H")


def _plan(call: Call) -> Plan:
    M, K = call.dims("MK")
    A, B, C, H = (call.plain[name] for name in WIDTHS)
    has = (call.given("bias_N"), call.given("step_bias_H"))
    return uncached(plan)(LinearCall(call.arch, call.dtypes["x_MK"], M, K, (A, B, C, H), bool(call.plain["gated"]), *has))


NATIVE = Native(
    "linear",
    _plan,
    (Output("a_MA", "x_MK"), Output("b_MB", "x_MK"), Output("c_MC", "x_MK"), Output("dt_MH", torch.float32)),
    names={"bias_N": ("bias_N", "weight_NK"), "step_bias_H": ("step_bias_H", "weight_NK")},
    sizes=lambda plain: {name: plain[name] for name in WIDTHS},
    rows={"few_rows_kernel": Rows("K", ("BLOCK_N", "BLOCK_K"))},
)
