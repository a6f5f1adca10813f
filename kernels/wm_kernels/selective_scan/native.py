"""How `selective_scan` becomes launches."""

import torch

from wm_kernels.native import Call, Native, Output, uncached
from wm_kernels.selective_scan.plan import plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    sizes, N = call.dims("BTCN"), call.sizes["N"]
    x, dt, B, C = (call.strides(name, 2) for name in ("x_BTC", "dt_BTC", "B_BTN", "C_BTN"))
    given, state = (call.given("valid_B"), call.given("state_BCN")), call.strides("next_BCN", 2)
    return uncached(plan)(*sizes, call.dtypes["x_BTC"], given, (*x, *dt, N, *B, *C), state * 2, call.arch)


NATIVE = Native(
    "selective_scan",
    _plan,
    (Output("y_BTC", "x_BTC"), Output("next_BCN", torch.float32, alias="state_BCN")),
    names={"valid_B": ("valid_B", "x_BTC"), "before": ("state_BCN", "next_BCN"), "after": "next_BCN"},
    apart=True,
)
