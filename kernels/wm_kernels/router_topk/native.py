"""How `router_topk` becomes launches."""

import torch

from wm_kernels.native import Call, Native, NotServedError, Output, uncached
from wm_kernels.router_topk.plan import WIDEST, plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    M, E = call.dims("ME")
    if E > WIDEST:
        raise NotServedError(f"wm::router_topk: {E} experts, expected at most {WIDEST}")
    return uncached(plan)(M, E, call.plain["k"], call.dtypes["logits_ME"], call.plain["normalize"], E, call.arch)


NATIVE = Native(
    "router_topk",
    _plan,
    (Output("weight_Mk", "logits_ME"), Output("expert_Mk", torch.int64)),
    sizes=lambda plain: {"k": plain["k"]},
)
