"""How `ssd_scan` and `ssd_scan_rope` become launches."""

from dataclasses import replace

import torch

from wm_kernels.native import Call, Native, Output, Rows
from wm_kernels.ssd_scan.plan import ScanCall, plan
from wm_kernels.triton_launch import Plan


def _plan(call: Call) -> Plan:
    B, T, H, P, G, N = call.dims("BTHPGN")
    turns = call.given("cos_BTF")
    state = call.strides("next_BHNP", 3)
    return plan(
        ScanCall(
            op="ssd_scan_rope" if turns else "ssd_scan",
            arch=call.arch,
            dtype=call.dtypes["x_BTHP"],
            B=B,
            T=T,
            H=H,
            P=P,
            G=G,
            N=N,
            F=call.sizes["F"] if turns else 0,
            x_BTH=call.strides("x_BTHP", 3),
            dt_BTH=call.strides("dt_BTH"),
            A_H=call.strides("A_H"),
            B_BTG=call.strides("B_BTGN", 3),
            C_BTG=call.strides("C_BTGN", 3),
            cos_BT=call.strides("cos_BTF", 2) if turns else (0, 0),
            sin_BT=call.strides("sin_BTF", 2) if turns else (0, 0),
            state_BHN=state if call.given("state_BHNP") else (0, 0, 0),
            out_BHN=state,
            has_state=call.given("state_BHNP"),
            has_valid=call.given("valid_B"),
        )
    )


NATIVE = Native(
    "ssd_scan",
    _plan,
    (Output("y_BTHP", "x_BTHP"), Output("next_BHNP", torch.float32, alias="state_BHNP")),
    names={
        "x": "x_BTHP", "dt": "dt_BTH", "A": "A_H", "B": "B_BTGN", "C": "C_BTGN", "cos": "cos_BTF", "sin": "sin_BTF", "valid": "valid_B",
        "state": "state_BHNP", "y": "y_BTHP", "out": "next_BHNP",
    },
    apart=True,
    rows={
        "segment_states": Rows("P", ("BLOCK_Q", "BLOCK_P")),
        "scan_segments": Rows("P", ("BLOCK_Q", "BLOCK_P")),
        "scan_tokens": Rows("P", ("BLOCK_N", "BLOCK_P")),
    },
)  # fmt: skip
TURNING = replace(NATIVE, op="ssd_scan_rope")
