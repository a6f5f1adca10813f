"""How `attention` becomes launches: the new keys and values go into the cache, which is then read."""

from wm_kernels.attention.plan import Strides, plan
from wm_kernels.native import Call, Native, NotServedError, Output, Rows, uncached
from wm_kernels.triton_launch import Plan

ROWS = {
    "write_cells": Rows("P", ("BLOCK_T", "BLOCK_P")),
    "attend_cells": Rows("P", ("BLOCK_N", "BLOCK_P")),
    "attend_some_cells": Rows("P", ("BLOCK_N", "BLOCK_P")),
}


def strides_of_tokens(call: Call) -> dict[str, tuple[int, ...]]:
    """Strides of the tokens' tensors, by the plan's names."""
    return {
        name: call.strides(f"{tensor}_BT{heads}P") for name, tensor, heads in (("q", "q", "H"), ("new_k", "k", "K"), ("new_v", "v", "K"))
    }


def strides_of_cells(call: Call) -> dict[str, tuple[int, ...]]:
    """Strides of the cells, tokens before heads, as the plan has them."""
    if not call.given("cache_k_BKSP"):
        raise NotServedError("without a cache attention is torch's own; give caches and a position")
    b, k, s, p = call.strides("cache_k_BKSP")
    return {"k": (b, s, k, p), "v": (b, s, k, p)}


def _plan(call: Call) -> Plan:
    B, T, H, K, P, S = call.dims("BTHKPS")
    strides: Strides = tuple((strides_of_cells(call) | strides_of_tokens(call)).items())
    return uncached(plan)(B, T, H, K, 1, P, S, "none", True, call.dtypes["q_BTHP"], call.arch, strides)


NATIVE = Native(
    "attention",
    _plan,
    (
        Output("out_BTHP", "q_BTHP"),
        Output("next_k_BKSP", "q_BTHP", alias="cache_k_BKSP"),
        Output("next_v_BKSP", "q_BTHP", alias="cache_v_BKSP"),
    ),
    names={
        "q": "q_BTHP", "k": "next_k_BKSP", "v": "next_v_BKSP", "new_k": "k_BTKP", "new_v": "v_BTKP", "position": "position_B",
        "out": "out_BTHP",
    },
    rows=ROWS,
)  # fmt: skip
