"""`rope_angles` by a Triton kernel. B batch, T tokens, F rotated pairs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wm_kernels.rope_angles.plan import plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run

_known: dict[tuple[object, ...], Known] = {}


def rope_angles_triton(
    position_BT: Tensor,
    pairs: int,
    theta: float,
    length_B: Tensor | None,
    *scaling: Any,
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `rope_angles_reference`; float32. Positions that do not follow each other are copied first.

    `scaling` and its numbers are all given, in the reference's order. `check` raises where arguments are wrong; it is called unless a call
    of the same shapes and numbers has passed it.
    """
    given = {"position_BT": position_BT, "length_B": position_BT if length_B is None else length_B}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        return plan(*ready["position_BT"].shape, pairs, theta, *scaling, architecture(position_BT.device))

    key = (pairs, theta, *scaling, *call_key(position_BT, length_B))
    made = known_plan(_known, key, given, make, check, lambda name, tensor: not tensor.is_contiguous())
    cos_BTF, sin_BTF = (torch.empty((*position_BT.shape, pairs), dtype=torch.float32, device=position_BT.device) for _ in range(2))
    run(made, {**given, "cos_BTF": cos_BTF, "sin_BTF": sin_BTF})
    return cos_BTF, sin_BTF
