"""WmSelectiveScan: the recurrence of Mamba-1, a decay per channel and state.

    S_t = exp(dt_t A) * S_(t-1) + dt_t x_t ⊗ B_t        y_t = S_t C_t        tokens t >= valid act as dt = 0

A Scan over tokens: one state at a time, so memory does not grow with T · C · N. The state is turned to [N, C] for it, because N is
small and rows of N entries are slow to broadcast over. com.microsoft LinearAttention could run it with a head per channel, but would
want the decays and B written out to T · C · N, and takes several times as long.

Letters: B batch, T tokens, C channels, N state.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import FLOAT, Body, Flavour, Value
from wm_kernels.onnx_schema import FLOAT32, FLOAT_T, INT64, wm_op

OP_TYPE = "WmSelectiveScan"
INPUTS = [
    ("x_BTC", FLOAT_T),
    ("dt_BTC", FLOAT32),
    ("A_CN", FLOAT32),
    ("B_BTN", FLOAT_T),
    ("C_BTN", FLOAT_T),
    ("state_BCN", FLOAT32),
    ("valid_B", INT64),
]
OUTPUTS = [("y_BTC", FLOAT_T), ("next_BCN", FLOAT32)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS)


def translation(x_BTC: Any, dt_BTC: Any, A_CN: Any, B_BTN: Any, C_BTN: Any, state_BCN: Any, valid_B: Any) -> Any:
    """torch.ops.wm.selective_scan to its node."""
    return _node(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for every size."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTC, dt, A_CN, B, C, state_BCN, valid_B = g.all_inputs()
    T = g.dim(x_BTC, 1)
    exists_BT1 = g.unsqueeze(g.unsqueeze(g.arange(T), 0) < g.unsqueeze(valid_B, 1), 2)
    dt_BTC = g.Where(exists_BT1, dt, 0.0)
    dtx_BTC = g.f32(x_BTC) * dt_BTC
    B_BTN, C_BTN, A_NC, state_BNC = g.f32(B), g.f32(C), g.transpose(A_CN, 1, 0), g.transpose(state_BCN, 0, 2, 1)

    def tokens() -> list[Value]:
        return _tokens(g, dtx_BTC, dt_BTC, A_NC, B_BTN, C_BTN, state_BNC)

    def token() -> list[Value]:
        # With T = 1, B and C are already one column and one row per batch row.
        next_BNC, y_BTC = _step(g, A_NC, state_BNC, dt_BTC, dtx_BTC, g.transpose(B_BTN, 0, 2, 1), C_BTN)
        return [y_BTC, next_BNC]

    y_BTC, next_BNC = g.branch(g.Equal(g.Squeeze(T, [0]), 1), (FLOAT, FLOAT), token, tokens) if g.ort else tokens()
    return g.function({"y_BTC": g.narrow(y_BTC), "next_BCN": g.transpose(next_BNC, 0, 2, 1)})


def _tokens(g: Body, dtx: Value, dt: Value, A_NC: Value, B: Value, C: Value, state_BNC: Value) -> list[Value]:
    dtx_TBC, dt_TBC, B_TBN, C_TBN = (g.transpose(v, 1, 0, 2) for v in (dtx, dt, B, C))
    rows = (g.unsqueeze(dt_TBC, 2), g.unsqueeze(dtx_TBC, 2), g.unsqueeze(B_TBN, 3), g.unsqueeze(C_TBN, 2))
    next_BNC, y_TB1C = g.scan(state_BNC, rows, FLOAT, lambda state, row: _step(g, A_NC, state, *row))
    return [g.transpose(g.Squeeze(y_TB1C, [2]), 1, 0, 2), next_BNC]


def _step(g: Body, A_NC: Value, state_BNC: Value, dt_B1C: Value, dtx_B1C: Value, B_BN1: Value, C_B1N: Value) -> tuple[Value, Value]:
    """One token: the state after it and y_B1C."""
    next_BNC = state_BNC * g.Exp(dt_B1C * A_NC) + B_BN1 * dtx_B1C
    return next_BNC, C_B1N @ next_BNC
