"""How `moe_mix` becomes launches. Of many tokens too every pick reads its expert's matrices: grouped products are another library's."""

from wm_kernels.moe_mix.plan import picks_plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    M, k, D, I, F = call.dims("MkDIF")
    biases = call.given("in_bias_EF"), call.given("out_bias_ED")
    strides = D, (F * D, D), (D * I, I), (F if biases[0] else D, D)
    formulas = call.plain["gated"], biases, call.plain["activation"]
    return uncached(picks_plan)(M, k, D, I, call.dtypes["x_MD"], *formulas, *strides, call.arch)


NATIVE = Native(
    "moe_mix",
    _plan,
    (Output("y_MD", "x_MD"),),
    names={
        "expert_N": "expert_Mk",
        "weight_N": "weight_Mk",
        "in_bias_EF": ("in_bias_EF", "x_MD"),
        "out_bias_ED": ("out_bias_ED", "x_MD"),
    },
    rows={"moe_pick_hidden_kernel": Rows("D", ("BLOCK_I", "BLOCK_D")), "moe_pick_outer_kernel": Rows("I", ("BLOCK_I", "BLOCK_D"))},
)
