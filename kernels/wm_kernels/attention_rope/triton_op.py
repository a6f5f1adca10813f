"""Attention from a packed projection by Triton kernels: tensors to a plan and back.

B batch   T tokens   K key/value heads   P head dimension   F rotated pairs   L cells   C packed width   E output width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wm_kernels.attention_rope.plan import plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Plan, architecture, call_key, remember, run, strides
from wm_kernels.triton_support import inner_contiguous

NAMES = ("qkv", "cos", "sin", "k", "v", "position")


@dataclass(frozen=True)
class _Known:
    """What a call of certain shapes, strides and dtypes comes to; `as_given`: no tensor is copied first."""

    plan: Plan
    as_given: bool


_known: dict[tuple[object, ...], _Known] = {}


def attend_packed_triton(
    qkv_BTC: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    k_BKLP: Tensor,
    v_BKLP: Tensor,
    position_B: Tensor,
    n_head: int,
    check: tuple[Callable[[], None], Sequence[Tensor | None]] | None = None,
) -> Tensor:
    """Rotate queries and keys, write keys and values into cells position + t, attend to cells 0 .. position + t.

    In `numerics` "exact", T tokens give the bits of T calls of one token, and of any split.

    Args:
        qkv_BTC: all query heads, then all key heads, then all value heads, not yet rotated; float32, float16 or bfloat16.
        cos_BTF: cosines of the tokens' angles, float32.
        sin_BTF: their sines.
        k_BKLP: keys, written in place; rows of P entries are contiguous.
        v_BKLP: their values, likewise.
        position_B: cells in use before the tokens, int64.
        n_head: query heads; the sizes of kv heads are those of the cells.
        check: what raises where arguments are wrong, called unless a call of the same shapes and dtypes has passed it; and tensors that it
            looks at beside those above.

    Returns:
        out_BTE, contiguous. Any outer strides are read as they are; tensors whose last axis is not contiguous are copied.
    """
    tensors = (qkv_BTC, cos_BTF, sin_BTF, k_BKLP, v_BKLP, position_B)
    function, others = check or (None, ())
    key = (n_head, *call_key(*tensors, *others))
    known = _known.get(key)
    if known is None and function is not None:
        function()
    given = dict(zip(NAMES, tensors, strict=True))
    if known is None or not known.as_given:
        given |= {name: inner_contiguous(given[name]) for name in ("qkv", "cos", "sin")} | {"position": position_B.contiguous()}
    if known is None:
        as_given = all(value is given[name] for name, value in zip(NAMES, tensors, strict=True))
        known = remember(_known, key, _Known(_plan(given, n_head), as_given))
    out_BTE = torch.empty((*qkv_BTC.shape[:2], n_head * k_BKLP.shape[3]), dtype=qkv_BTC.dtype, device=qkv_BTC.device)
    run(known.plan, {**given, "out": out_BTE})
    return out_BTE


def _plan(given: dict[str, Tensor], n_head: int) -> Plan:
    qkv, cos, k = given["qkv"], given["cos"], given["k"]
    (B, T, _), (_, K, L, P) = qkv.shape, k.shape
    outer = {name: strides(given[name]) for name in ("qkv", "cos", "sin", "k", "v")}
    for name in "kv":
        b, head, cell, p = outer[name]
        outer[name] = (b, cell, head, p)  # as tokens have them
    return plan(B, T, n_head, K, P, cos.shape[2], L, qkv.dtype, architecture(qkv.device), tuple(outer.items()), exact())
