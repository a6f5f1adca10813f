"""Rotary angles.

B batch   T tokens   F rotated pairs
"""

import torch
from torch import Tensor

from wm_kernels._registration import check_dtype, check_shapes, check_that


def rope_angles_reference(position_BT: Tensor, pairs: int, theta: float, double: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotary angles.

        angle[b, t, j] = position[b, t] * theta^(-j / F)        j = 0 .. F - 1

    Angles are formed in float64, because position * frequency in float32 is wrong by a radian near position 2^24.

    Args:
        position_BT: token positions, int64, 0 to 2^24.
        pairs: F, the number of rotated pairs; at least 1.
        theta: base of the frequencies; positive.
        double: return float64 instead of float32.

    Returns:
        (cos_BTF, sin_BTF), float32 or float64.

    Raises:
        RuntimeError: position is not a two-dimensional int64 tensor, or pairs or theta is out of range.

    Source:
        Su et al. 2021, RoFormer, arXiv:2104.09864, section 3.2.
    """
    _check(position_BT, pairs, theta)
    j_F = torch.arange(pairs, dtype=torch.float64, device=position_BT.device)
    angle_BTF = position_BT.to(torch.float64).unsqueeze(-1) * torch.pow(theta, -j_F / pairs)
    dtype = torch.float64 if double else torch.float32
    return angle_BTF.cos().to(dtype), angle_BTF.sin().to(dtype)


def _check(position_BT: Tensor, pairs: int, theta: float) -> None:
    check_shapes("rope_angles", position_BT=position_BT)
    check_dtype("rope_angles", torch.int64, position_BT=position_BT)
    check_that("rope_angles", pairs >= 1, lambda: f"pairs is {pairs}, expected at least 1")
    check_that("rope_angles", theta > 0, lambda: f"theta is {theta}, expected a positive number")


@torch.library.custom_op("wm::rope_angles", mutates_args=())
def rope_angles(position_BT: Tensor, pairs: int, theta: float, double: bool = False) -> tuple[Tensor, Tensor]:
    """See `rope_angles_reference`."""
    cos_BTF, sin_BTF = rope_angles_reference(position_BT, pairs, theta, double)
    return cos_BTF.contiguous(), sin_BTF.contiguous()


@rope_angles.register_fake
def _(position_BT: Tensor, pairs: int, theta: float, double: bool = False) -> tuple[Tensor, Tensor]:
    _check(position_BT, pairs, theta)
    shape = (*position_BT.shape, pairs)
    dtype = torch.float64 if double else torch.float32
    return position_BT.new_empty(shape, dtype=dtype), position_BT.new_empty(shape, dtype=dtype)
