"""Attention from a packed projection by Triton kernels: tensors to a plan and back.

B batch   T tokens   K key/value heads   P head dimension   F rotated pairs   L cells   C packed width   E output width
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from wm_kernels.attention_rope.plan import plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, not_in_rows, run, strides

NAMES = ("qkv", "cos", "sin", "k", "v", "position")


_known: dict[tuple[object, ...], Known] = {}


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
    given = dict(zip(NAMES, tensors, strict=True))
    made = known_plan(_known, (n_head, *call_key(*tensors, *others)), given, partial(_plan, n_head), function, _copied)
    out_BTE = qkv_BTC.new_empty((*qkv_BTC.shape[:2], n_head * k_BKLP.shape[3]))
    run(made, {**given, "out": out_BTE})
    return out_BTE


def _copied(name: str, tensor: Tensor) -> bool:
    if name == "position":
        return not tensor.is_contiguous()
    return name not in ("k", "v") and not_in_rows(name, tensor)


def _plan(n_head: int, given: Mapping[str, Tensor]) -> Plan:
    qkv, cos, k = given["qkv"], given["cos"], given["k"]
    (B, T, _), (_, K, L, P) = qkv.shape, k.shape
    outer = {name: strides(given[name]) for name in ("qkv", "cos", "sin", "k", "v")}
    for name in "kv":
        b, head, cell, p = outer[name]
        outer[name] = (b, cell, head, p)  # as tokens have them
    return plan(B, T, n_head, K, P, cos.shape[2], L, qkv.dtype, architecture(qkv.device), tuple(outer.items()), exact())
