"""Keep-window attention by Triton kernels: tensors to a plan and back.

B batch   T tokens   H query heads   K key/value heads   P head dimension   W slots, or window
"""

import torch
from torch import Tensor

from wm_kernels.keep_window_attention.plan import NEW_SLOTS, SLOTS, planned
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import run
from wm_kernels.triton_support import inner_contiguous

State = tuple[Tensor, Tensor, Tensor, Tensor]


def keep_window_attention_triton(
    q_BTHP: Tensor,
    k_BTKP: Tensor,
    v_BTKP: Tensor,
    score_BTK: Tensor,
    slots: State | None,
    position_B: Tensor | None,
    valid_B: Tensor | None,
    window: int,
    in_place: bool = False,
) -> tuple[Tensor, State | None]:
    """`keep_window_attention_reference` for float32, float16 and bfloat16, arguments checked; in place, the slots given are returned.

    Any outer strides are read and written as they are; tensors whose last axis is not contiguous are copied. In `numerics`
    "exact", T tokens give the bits of T calls of one token, and of any split: each token's keys are summed in the order of the slots.
    """
    tensors = {"q": inner_contiguous(q_BTHP), "k": inner_contiguous(k_BTKP), "v": inner_contiguous(v_BTKP), "score": score_BTK}
    bits_count = exact()
    written = q_BTHP.shape[1] == 1 or bits_count  # the slots given are
    new: State | None = None
    if slots is not None and position_B is not None:
        given: State = (inner_contiguous(slots[0]), inner_contiguous(slots[1]), slots[2], slots[3])
        if written and not in_place:
            given = _copies(slots)
        tensors |= {**dict(zip(SLOTS, given, strict=True)), "position": position_B.contiguous()}
        new = given
        if not (written or in_place):
            new = (*(torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in slots),)  # type: ignore[assignment]
            tensors |= dict(zip(NEW_SLOTS, new or (), strict=True))
    if valid_B is not None:
        tensors["valid"] = valid_B.contiguous()
    out_BTHP = torch.empty(q_BTHP.shape, dtype=q_BTHP.dtype, device=q_BTHP.device)
    layout = tuple((name, tensor.shape, tensor.stride()) for name, tensor in tensors.items())
    plan = planned(layout, window, in_place, bits_count, q_BTHP.dtype, q_BTHP.device)
    run(plan, {**tensors, "out": out_BTHP})
    if in_place and slots is not None and new is not None:
        for leaf, after in zip(slots, new, strict=True):
            if leaf is not after:
                leaf.copy_(after)
    return out_BTHP, new


def _copies(slots: State) -> State:
    k, v, score, position = (leaf.clone(memory_format=torch.contiguous_format) for leaf in slots)
    return k, v, score, position
