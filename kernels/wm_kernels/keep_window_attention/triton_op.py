"""Keep-window attention by Triton kernels: tensors to a plan and back.

B batch   T tokens   H query heads   K key/value heads   P head dimension   W slots, or window
"""

from collections.abc import Callable

import torch
from torch import Tensor

from wm_kernels.keep_window_attention.plan import NEW_SLOTS, SLOTS, planned
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, call_key, remember, run
from wm_kernels.triton_support import inner_contiguous

State = tuple[Tensor, Tensor, Tensor, Tensor]
NAMES = ("q", "k", "v", "score", *SLOTS, "position", "valid")
ROWS = ("q", "k", "v", "slot_k", "slot_v")  # read in rows of P entries


_known: dict[tuple[object, ...], Known] = {}


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
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, State | None]:
    """`keep_window_attention_reference` for float32, float16 and bfloat16, arguments checked; in place, the slots given are returned.

    Any outer strides are read and written as they are; tensors whose last axis is not contiguous are copied. In `numerics`
    "exact", T tokens give the bits of T calls of one token, and of any split: each token's keys are summed in the order of the slots.
    `check` raises where arguments are wrong; it is called unless a call of the same shapes and dtypes has passed it.
    """
    tensors = (q_BTHP, k_BTKP, v_BTKP, score_BTK, *(slots or (None,) * 4), position_B, valid_B)
    key = (window, in_place, *call_key(*tensors))
    known = _known.get(key)
    if known is None and check is not None:
        check()
    given = {name: value for name, value in zip(NAMES, tensors, strict=True) if value is not None}
    if known is None or known.copied:
        given = _prepared(given, in_place)
    if known is None:
        layout = tuple((name, tensor.shape, tensor.stride()) for name, tensor in given.items())
        plan = planned(layout, window, in_place, exact(), q_BTHP.dtype, q_BTHP.device)
        before = dict(zip(NAMES, tensors, strict=True))
        copied = tuple(name for name, value in given.items() if value is not before.get(name))
        known = remember(_known, key, Known(plan, copied))
    out_BTHP = torch.empty_like(q_BTHP, memory_format=torch.contiguous_format)
    run(known.plan, {**given, "out": out_BTHP})
    if slots is None or not known.copied:
        return out_BTHP, slots
    new = tuple(given[name] for name in (NEW_SLOTS if NEW_SLOTS[0] in given else SLOTS))
    if in_place:
        for leaf, after in zip(slots, new, strict=True):
            if leaf is not after:
                leaf.copy_(after)
    return out_BTHP, (new[0], new[1], new[2], new[3])


def _prepared(given: dict[str, Tensor], in_place: bool) -> dict[str, Tensor]:
    """The tensors as kernels take them, with the slots to write: new ones of a prompt, copies of the ones given or these themselves."""
    ready = {name: inner_contiguous(value) if name in ROWS else value for name, value in given.items()}
    for name in ("position", "valid"):
        if name in ready:
            ready[name] = ready[name].contiguous()
    if SLOTS[0] not in given or in_place:
        return ready
    if given["q"].shape[1] == 1 or exact():  # the slots given are written
        return ready | {name: given[name].clone(memory_format=torch.contiguous_format) for name in SLOTS}
    new = (torch.empty_like(given[name], memory_format=torch.contiguous_format) for name in SLOTS)
    return ready | dict(zip(NEW_SLOTS, new, strict=True))
