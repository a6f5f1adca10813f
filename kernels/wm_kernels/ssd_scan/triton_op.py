"""`ssd_scan` and `ssd_scan_rope` on tensors, through their Triton kernels.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

from collections.abc import Mapping

from torch import Tensor

from wm_kernels.ssd_scan.plan import ScanCall, plan
from wm_kernels.triton_launch import architecture, run

FAR = 2**23  # a token stride up to which 32 bits hold the offsets inside a chunk


def ssd_scan_triton(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
    cos_BTF: Tensor | None = None,
    sin_BTF: Tensor | None = None,
    in_place: bool = False,
    numerics: str = "fast",
) -> tuple[Tensor, Tensor]:
    """`ssd_scan_reference`, or with angles `ssd_scan_rope_reference`, of arguments already checked.

    Products take operands rounded to the dtype of x; sums and the state are float32. A tensor whose last axis is not contiguous is copied.

    Args:
        x_BTHP: float32, float16 or bfloat16, as B and C.
        dt_BTH: float32; see the reference, as for all that follow.
        A_H: float32.
        B_BTGN: dtype of x.
        C_BTGN: dtype of x.
        state_BHNP: float32, or None.
        valid_B: int64, or None.
        cos_BTF: float32 or float64, or None for no rotation.
        sin_BTF: as cos.
        in_place: write the new state into `state_BHNP`, which must be given.
        numerics: "fast", or "exact": T tokens give the bits of T calls of one token, and of any split; token after token in float32.

    Returns:
        (y_BTHP, contiguous; state_BHNP: the one given if `in_place`, else a new contiguous one).
    """
    (B, T, H, P), N = x_BTHP.shape, B_BTGN.shape[3]
    given = {"x": _rows(x_BTHP), "dt": dt_BTH, "A": A_H, "B": _rows(B_BTGN), "C": _rows(C_BTGN)}
    if cos_BTF is not None and sin_BTF is not None and cos_BTF.shape[-1] > 0:
        given |= {"cos": _rows(cos_BTF), "sin": _rows(sin_BTF)}
    if valid_B is not None:
        given["valid"] = valid_B.contiguous()
    if state_BHNP is not None:
        given["state"] = _rows(state_BHNP)
    direct = in_place and state_BHNP is not None and given["state"] is state_BHNP
    y_BTHP = x_BTHP.new_empty((B, T, H, P))
    out_BHNP = given["state"] if direct else dt_BTH.new_empty((B, H, N, P))
    call = describe(given, out_BHNP, numerics == "exact")
    run(plan(call), given | {"y": y_BTHP, "out": out_BHNP})
    if in_place and not direct and state_BHNP is not None:
        state_BHNP.copy_(out_BHNP)
        return y_BTHP, state_BHNP
    return y_BTHP, out_BHNP


def describe(given: Mapping[str, Tensor], out_BHNP: Tensor, exact: bool = False) -> ScanCall:
    """What the plan of a call must know of its tensors, by their names in the plan."""
    (B, T, H, P), (G, N) = given["x"].shape, given["B"].shape[2:]
    return ScanCall(
        op="ssd_scan_rope" if "cos" in given else "ssd_scan",
        arch=architecture(given["x"].device),
        dtype=given["x"].dtype,
        B=B,
        T=T,
        H=H,
        P=P,
        G=G,
        N=N,
        F=given["cos"].shape[-1] if "cos" in given else 0,
        x_BTH=_outer(given["x"], 3),
        dt_BTH=_outer(given["dt"], 3),
        A_H=given["A"].stride(),
        B_BTG=_outer(given["B"], 3),
        C_BTG=_outer(given["C"], 3),
        cos_BT=_outer(given.get("cos"), 2),
        sin_BT=_outer(given.get("sin"), 2),
        state_BHN=_outer(given.get("state"), 3),
        out_BHN=_outer(out_BHNP, 3),
        has_state="state" in given,
        has_valid="valid" in given,
        exact=exact,
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor if its last axis is contiguous and its tokens are near each other, else a contiguous copy."""
    near = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if near and tensor.stride(1) <= FAR else tensor.contiguous()


def _outer(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """Strides of the first axes; that of a batch of 1, which nobody steps over, is 0: it may be too large for 32 bits."""
    if tensor is None:
        return (0,) * axes
    first, *others = tensor.stride()[:axes]
    return 0 if tensor.shape[0] == 1 else first, *others
