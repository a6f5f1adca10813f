"""How `keep_window_attention` becomes launches, which work on the slots in place."""

from wm_kernels.keep_window_attention.plan import SLOTS, plan
from wm_kernels.keep_window_attention.plan import Call as WindowCall
from wm_kernels.native import Call, Native, NotServedError, Output, Rows, uncached
from wm_kernels.triton_launch import Plan

TENSORS = {
    "q": "q_BTHP", "k": "k_BTKP", "v": "v_BTKP", "score": "score_BTK", "slot_k": "next_k_BKWP", "slot_v": "next_v_BKWP",
    "slot_score": "next_score_BKW", "slot_position": "next_position_BKW", "position": "position_B", "valid": "valid_B", "out": "out_BTHP",
}  # fmt: skip


def _plan(call: Call) -> Plan:
    if not call.given("slot_k_BKWP"):
        raise NotServedError("wm::keep_window_attention: a bundle's graph gives slots; give them and a position")
    strides = tuple((name, call.strides(TENSORS[name])) for name in ("q", "k", "v", "score", *SLOTS))
    B, T, H, K, P, W = call.dims("BTHKPW")
    return uncached(plan)(WindowCall(B, T, H, K, P, W, True, call.given("valid_B"), True, call.dtypes["q_BTHP"], call.arch, strides))


NATIVE = Native(
    "keep_window_attention",
    _plan,
    (
        Output("out_BTHP", "q_BTHP"),
        Output("next_k_BKWP", "q_BTHP", alias="slot_k_BKWP"),
        Output("next_v_BKWP", "q_BTHP", alias="slot_v_BKWP"),
        Output("next_score_BKW", "slot_score_BKW", alias="slot_score_BKW"),
        Output("next_position_BKW", "slot_position_BKW", alias="slot_position_BKW"),
    ),
    names=TENSORS,
    sizes=lambda plain: {"W": plain["window"]},
    rows={
        "attend_slots": Rows("P", ("BLOCK_N", "BLOCK_P")),
        "attend_listed": Rows("P", ("BLOCK_N", "BLOCK_P")),
        "refill_slots": Rows("P", ("BLOCK", "BLOCK_P")),
    },
)
