"""How `causal_conv1d` becomes launches."""

import torch

from wm_kernels.causal_conv1d.plan import plan
from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    B, T, C, L = call.dims("BTCL")
    given = call.given("bias_C"), call.given("state_BYC"), call.given("valid_B")
    state = (L - 1) * C, C
    x, silu = call.strides("x_BTC", 2), call.plain["activation"] == "silu"
    return uncached(plan)(B, T, C, L, call.dtypes["x_BTC"], given, silu, x, L, state, state, call.arch)


NATIVE = Native(
    "causal_conv1d",
    _plan,
    (Output("y_BTC", "x_BTC"), Output("next_BYC", torch.float32, alias="state_BYC")),
    names={
        "bias_C": ("bias_C", "weight_CL"),
        "before_BYC": ("state_BYC", "next_BYC"),
        "valid_B": ("valid_B", "x_BTC"),
        "after_BYC": "next_BYC",
    },
    apart=True,
    rows={"causal_conv1d_kernel": Rows("C", ("BLOCK_T", "BLOCK_C"))},
)
