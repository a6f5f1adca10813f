"""How `product_key_topk` becomes launches."""

import torch

from wm_kernels.native import Call, Native, Output, Rows, uncached
from wm_kernels.product_key_topk.plan import plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    sizes, strides = call.dims("BTRdJ"), (call.strides("query_BTR2d", 4), call.strides("keys_RJ2d", 3))
    return uncached(plan)(*sizes, call.plain["k"], call.dtypes["query_BTR2d"], *strides, call.arch)


NATIVE = Native(
    "product_key_topk",
    _plan,
    (Output("weight_BTRk", "query_BTR2d"), Output("expert_BTRk", torch.int64)),
    names={"weight_MRk": "weight_BTRk", "expert_MRk": "expert_BTRk"},
    sizes=lambda plain: {"k": plain["k"]},
    rows={"product_key_topk_kernel": Rows("d", ("BLOCK_J", "BLOCK_d"))},
)
