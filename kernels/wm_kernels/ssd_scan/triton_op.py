"""`ssd_scan` and `ssd_scan_rope` on tensors, through their Triton kernels.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from wm_kernels.numerics import exact
from wm_kernels.ssd_scan.plan import ScanCall, plan
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, run

FAR = 2**23  # a token stride up to which 32 bits hold the offsets inside a chunk
NAMES = ("x", "dt", "A", "B", "C", "cos", "sin", "valid", "state")


_known: dict[tuple[object, ...], Known] = {}


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
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan_reference`, or with angles `ssd_scan_rope_reference`, through the kernels.

    Products take operands rounded to the dtype of x; sums and the state are float32. A tensor whose last axis is not contiguous is copied.
    With `numerics("exact")` the recurrence itself is run in float32, token after token.

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
        check: raises where the arguments are wrong; called unless a call of the same shapes and dtypes has passed it.

    Returns:
        (y_BTHP, contiguous; state_BHNP: the one given if `in_place`, else a new contiguous one).
    """
    tensors = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, valid_B, state_BHNP)
    given = {name: value for name, value in zip(NAMES, tensors, strict=True) if value is not None}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        direct = in_place and ready["state"] is state_BHNP
        return plan(describe(ready, ready["state"] if direct else x_BTHP.new_empty(_state(x_BTHP, B_BTGN))))

    made = known_plan(_known, (in_place, *call_key(*tensors)), given, make, check, _must_copy)
    y_BTHP = given["y"] = x_BTHP.new_empty(x_BTHP.shape)
    direct = in_place and given["state"] is state_BHNP
    out_BHNP = given["out"] = given["state"] if direct else dt_BTH.new_empty(_state(x_BTHP, B_BTGN))
    run(made, given)
    if in_place and not direct and state_BHNP is not None:
        state_BHNP.copy_(out_BHNP)
        return y_BTHP, state_BHNP
    return y_BTHP, out_BHNP


def _state(x_BTHP: Tensor, B_BTGN: Tensor) -> tuple[int, ...]:
    (B, _, H, P), N = x_BTHP.shape, B_BTGN.shape[3]
    return B, H, N, P


def _must_copy(name: str, tensor: Tensor) -> bool:
    """Whether a kernel cannot read it where it is: its last axis is not contiguous, or its tokens are very far from each other."""
    if name in ("dt", "A"):
        return False
    if name == "valid":
        return not tensor.is_contiguous()
    return (tensor.stride(-1) != 1 and tensor.shape[-1] > 1) or tensor.stride(1) > FAR


def describe(given: Mapping[str, Tensor], out_BHNP: Tensor) -> ScanCall:
    """What the plan of a call must know of its tensors, by their names in the plan, and the mode of numerics."""
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
        F=given["cos"].shape[-1] if "cos" in given else 0,  # with 0 angles as without
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
        exact=exact(),
    )


def _outer(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    """Strides of the first axes; that of a batch of 1, which nobody steps over, is 0: it may be too large for 32 bits."""
    if tensor is None:
        return (0,) * axes
    first, *others = tensor.stride()[:axes]
    return 0 if tensor.shape[0] == 1 else first, *others
