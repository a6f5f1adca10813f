"""How `expert_mix` becomes launches. Of many tokens too it reads the picked rows: products with all experts are another library's."""

from wm_kernels.expert_mix.plan import plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    B, T, D, R, k = call.dims("BTDRk")
    formulas = call.plain["activation"], call.plain["weight_inside"]
    return uncached(plan)(B, T, D, R * k, call.dtypes["x_BTD"], *formulas, call.strides("x_BTD", 2), D, D, call.arch)


NATIVE = Native(
    "expert_mix",
    _plan,
    (Output("y_BTD", "x_BTD"),),
    names={"expert_MQ": "expert_BTRk", "weight_MQ": "weight_BTRk", "y_MD": "y_BTD"},
    rows={
        "expert_inner_kernel": Rows("D", ("TOKENS", "BLOCK_Q", "BLOCK_D")),
        "expert_outer_kernel": Rows("D", ("TOKENS", "BLOCK_Q", "BLOCK_D")),
    },
)
