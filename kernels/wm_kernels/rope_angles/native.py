"""How `rope_angles` becomes launches."""

import torch

from wm_kernels.native import Call, Native, NotServedError, Output, uncached
from wm_kernels.rope_angles.onnx_function import attributes_of
from wm_kernels.rope_angles.plan import plan
from wm_kernels.triton_launch import Plan

_NUMBERS = ("theta", "scaling", "factor", "original", "low", "high")


def _plan(call: Call) -> Plan:
    if call.plain["double"]:
        raise NotServedError("rope_angles in float64")
    return uncached(plan)(*call.dims("BTF"), *(call.plain[name] for name in _NUMBERS), call.arch)


NATIVE = Native(
    "rope_angles",
    _plan,
    (Output("cos_BTF", torch.float32), Output("sin_BTF", torch.float32)),
    names={"length_B": ("length_B", "position_BT")},
    attributes=lambda plain: attributes_of(plain["pairs"], *(plain[name] for name in _NUMBERS)),
    sizes=lambda plain: {"F": plain["pairs"]},
)
