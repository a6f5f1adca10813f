"""How `attention_rope` becomes launches."""

from wm_kernels.attention.native import NATIVE as ATTENTION
from wm_kernels.attention.native import ROWS, strides_of_cells
from wm_kernels.attention_rope.plan import plan
from wm_kernels.native import Call, Native, Output, Rows
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    strides = {name: call.strides(tensor) for name, tensor in (("qkv", "qkv_BTC"), ("cos", "cos_BTF"), ("sin", "sin_BTF"))}
    every = tuple((strides | strides_of_cells(call)).items())
    B, T, H, K, P, F, S = call.dims("BTHKPFS")
    return plan(B, T, H, K, P, F, S, call.dtypes["qkv_BTC"], call.arch, every)


NATIVE = Native(
    "attention_rope",
    _plan,
    (
        Output("out_BTE", "qkv_BTC"),
        Output("next_k_BKSP", "qkv_BTC", alias="cache_k_BKSP"),
        Output("next_v_BKSP", "qkv_BTC", alias="cache_v_BKSP"),
    ),
    names={
        "qkv": "qkv_BTC", "cos": "cos_BTF", "sin": "sin_BTF", "k": ATTENTION.names["k"], "v": ATTENTION.names["v"],
        "position": "position_B", "out": "out_BTE",
    },
    attributes={"n_head": "num_heads", "n_kv_head": "kv_num_heads"},
    sizes=lambda plain: {"H": plain["n_head"], "K": plain["n_kv_head"], "E": plain["n_head"] * plain["head_dim"]},
    rows={**ROWS, "rotate_into_cells": Rows("F", ("BLOCK_T", "BLOCK_F"))},
)  # fmt: skip
