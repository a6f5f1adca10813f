"""WmSsdScanRope: WmSsdScan with C and B rotated first, half-split over the first 2F of N.

Letters: as in WmSsdScan; F rotated pairs.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour
from wm_kernels.onnx_schema import FLOAT32, size, wm_op
from wm_kernels.rope.onnx_function import rotate
from wm_kernels.ssd_scan.onnx_function import ATTRIBUTES, OUTPUTS, scan, sizes
from wm_kernels.ssd_scan.onnx_function import INPUTS as _SCAN_INPUTS

OP_TYPE = "WmSsdScanRope"
INPUTS = [*_SCAN_INPUTS[:5], ("cos_BTF", FLOAT32), ("sin_BTF", FLOAT32), *_SCAN_INPUTS[5:]]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {**ATTRIBUTES, "pairs": int})


def translation(
    x_BTHP: Any, dt_BTH: Any, A_H: Any, B_BTGN: Any, C_BTGN: Any, cos_BTF: Any, sin_BTF: Any, state_BHNP: Any, valid_B: Any
) -> Any:
    """torch.ops.wm.ssd_scan_rope to its node."""
    attributes = {**sizes(x_BTHP, B_BTGN), "pairs": size(cos_BTF, 2)}
    return _node(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B, **attributes)


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one (H, G, P, N, F)."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B = g.all_inputs()
    B_BTGN = rotate(g, g.f32(B_BTGN), cos_BTF, sin_BTF, one["num_groups"], one["state_dim"], one["pairs"])
    C_BTGN = rotate(g, g.f32(C_BTGN), cos_BTF, sin_BTF, one["num_groups"], one["state_dim"], one["pairs"])
    y_BTHP, next_BHNP = scan(g, one, g.f32(x_BTHP), dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return g.function({"y_BTHP": g.narrow(y_BTHP), "next_BHNP": next_BHNP})
