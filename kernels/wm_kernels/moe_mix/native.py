"""How `moe_mix` becomes launches: pick by pick of few tokens, of many by tiles of an expert's picks."""

from wm_kernels.moe_mix.plan import picks_plan, tiles_plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    M, k, E, D, I, F = call.dims("MkEDIF")
    biases = call.given("in_bias_EF"), call.given("out_bias_ED")
    strides = D, (F * D, D), (D * I, I), (F if biases[0] else D, D)
    formulas = call.plain["gated"], biases, call.plain["activation"]
    arguments = (D, I, call.dtypes["x_MD"], *formulas, *strides, call.arch)
    return uncached(picks_plan)(M, k, *arguments) if M * k <= E else uncached(tiles_plan)(M, k, E, *arguments)


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
    rows={
        "moe_pick_hidden_kernel": Rows("D", ("BLOCK_I", "BLOCK_D")),
        "moe_pick_outer_kernel": Rows("I", ("BLOCK_I", "BLOCK_D")),
        "moe_tile_hidden_kernel": Rows("D", ("BLOCK_I", "BLOCK_D")),
        "moe_tile_outer_kernel": Rows("I", ("BLOCK_I", "BLOCK_D")),
    },
)
