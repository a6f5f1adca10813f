"""State space duality scan with rotary positions.

B batch   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.rope.definition import rope_reference
from wm_kernels.ssd_scan.definition import check_scan, fake_scan, has_kernel, scan, scan_


def ssd_scan_rope_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the state space recurrence with B and C rotated by each token's position.

        S_t = exp(dt_t A) S_{t-1} + rot_t(B_t) ⊗ dt_t x_t        y_t = rot_t(C_t)^T S_t

    so that y_t depends on the distance t - s to each earlier token s; the state never needs rotating again.

    Args:
        x_BTHP: inputs; any float dtype.
        dt_BTH: step sizes after softplus; not negative; float32, or float64 for float64 x.
        A_H: decay rates; negative; dtype of dt.
        B_BTGN: input maps, not yet rotated.
        C_BTGN: output maps, not yet rotated.
        cos_BTF: cosines from `rope_angles`; 2F <= N; the first 2F entries of B and C are rotated as in `rope`.
        sin_BTF: sines from `rope_angles`.
        state_BHNP: S before the first token, dtype of dt; None is zero.
        valid_B: tokens of each row that count, int64; None is T. Later tokens leave the state unchanged
            and their outputs are finite and without meaning.

    Returns:
        (y_BTHP in the dtype of x, state_BHNP after the last valid token in the dtype of dt). Arguments are left unchanged.

    Raises:
        RuntimeError: shapes or dtypes disagree, H is not a multiple of G, or 2F > N; the message names both.

    Source:
        arXiv:2412.11834 (rotary positions in the state space dual); Dao & Gu 2024, arXiv:2405.21060, section 6.
    """
    _check("ssd_scan_rope", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    B_rot, C_rot = _rotate(x_BTHP, B_BTGN, C_BTGN, cos_BTF, sin_BTF)
    return scan(x_BTHP, dt_BTH, A_H, B_rot, C_rot, state_BHNP, valid_B)


def _rotate(x_BTHP: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, cos_BTF: Tensor, sin_BTF: Tensor) -> tuple[Tensor, Tensor]:
    # The rotated maps go straight into float32 sums, so they are not rounded to the model's dtype in between.
    acc = acc_dtype(x_BTHP.dtype)
    return rope_reference(B_BTGN.to(acc), cos_BTF, sin_BTF), rope_reference(C_BTGN.to(acc), cos_BTF, sin_BTF)


def _check(
    op: str,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> None:
    check_scan(op, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    size = check_shapes(op, B_BTGN=B_BTGN, cos_BTF=cos_BTF, sin_BTF=sin_BTF)
    check_that(op, 2 * size["F"] <= size["N"], lambda: f"2F = {2 * size['F']} entries are rotated, expected at most N = {size['N']}")


@torch.library.custom_op("wm::ssd_scan_rope", mutates_args=())
def ssd_scan_rope(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd_scan_rope_reference`."""
    y_BTHP, state = ssd_scan_rope_reference(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    return y_BTHP.contiguous(), state.contiguous()


@register_kernel(ssd_scan_rope, "cuda")
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if has_kernel(x_BTHP, B_BTGN, C_BTGN):
        from wm_kernels.ssd_scan.triton_op import ssd_scan_triton

        def check() -> None:
            _check("ssd_scan_rope", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)

        return ssd_scan_triton(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B, cos_BTF, sin_BTF, check=check)
    _check("ssd_scan_rope", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    B_rot, C_rot = _rotate(x_BTHP, B_BTGN, C_BTGN, cos_BTF, sin_BTF)
    y_BTHP, state = scan(x_BTHP, dt_BTH, A_H, B_rot, C_rot, state_BHNP, valid_B)
    return y_BTHP.contiguous(), state.contiguous()


@ssd_scan_rope.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check("ssd_scan_rope", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    return fake_scan(x_BTHP, B_BTGN)


register_reference_autograd(ssd_scan_rope, ssd_scan_rope_reference)


@torch.library.custom_op("wm::ssd_scan_rope_", mutates_args=("state_BHNP",))
def ssd_scan_rope_(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    """`ssd_scan_rope` that writes the new state into `state_BHNP`; see `ssd_scan_rope_reference`."""
    _check("ssd_scan_rope_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    B_rot, C_rot = _rotate(x_BTHP, B_BTGN, C_BTGN, cos_BTF, sin_BTF)
    return scan_(x_BTHP, dt_BTH, A_H, B_rot, C_rot, state_BHNP, valid_B).contiguous()


@register_kernel(ssd_scan_rope_, "cuda")
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    if has_kernel(x_BTHP, B_BTGN, C_BTGN):
        from wm_kernels.ssd_scan.triton_op import ssd_scan_triton

        def check() -> None:
            _check("ssd_scan_rope_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)

        return ssd_scan_triton(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B, cos_BTF, sin_BTF, check=check, in_place=True)[0]
    _check("ssd_scan_rope_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    B_rot, C_rot = _rotate(x_BTHP, B_BTGN, C_BTGN, cos_BTF, sin_BTF)
    return scan_(x_BTHP, dt_BTH, A_H, B_rot, C_rot, state_BHNP, valid_B).contiguous()


@ssd_scan_rope_.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    cos_BTF: Tensor,
    sin_BTF: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    _check("ssd_scan_rope_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, cos_BTF, sin_BTF, state_BHNP, valid_B)
    return x_BTHP.new_empty(x_BTHP.shape)
