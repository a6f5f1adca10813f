"""Rotary angles.

B batch   T tokens   F rotated pairs
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wm_kernels._registration import check_dtype, check_shapes, check_that, register_kernel
from wm_kernels.triton_support import served

SCALINGS = ("none", "linear", "llama3", "dynamic")


def rope_angles_reference(
    position_BT: Tensor,
    pairs: int,
    theta: float,
    double: bool = False,
    length_B: Tensor | None = None,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 1,
    low: float = 1.0,
    high: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotary angles.

        angle[b, t, j] = position[b, t] * f[j]        f[j] = theta^(-j / F)        j = 0 .. F - 1

    Angles are formed in float64, because position * frequency in float32 is wrong by a radian near position 2^24. Scaling replaces

        linear    f[j] by f[j] / factor
        llama3    f[j] by f[j] * (s + (1 - s) / factor)        s = clip((original * f[j] / 2 pi - low) / (high - low), 0, 1)
        dynamic   theta by theta * (1 + factor * (length[b] / original - 1))^(F / (F - 1)) in rows with length[b] > original

    Args:
        position_BT: token positions, int64, 0 to 2^24.
        pairs: F, the number of rotated pairs; at least 1.
        theta: base of the frequencies; positive.
        double: return float64 instead of float32.
        length_B: tokens of each row up to and with this call, int64; read by dynamic scaling alone.
        scaling: one of `SCALINGS`.
        factor: by how much the scaling stretches; positive.
        original: length that needs no scaling, for llama3 and dynamic; at least 1.
        low: llama3 divides by `factor` where a frequency turns less than this often within `original`.
        high: llama3 leaves alone what turns more than this often; above `low`.

    Returns:
        (cos_BTF, sin_BTF), float32 or float64.

    Raises:
        RuntimeError: position or length is not an int64 tensor of its shape, or a number is out of range.

    Source:
        Su et al. 2021, RoFormer, arXiv:2104.09864, section 3.2. Linear: Chen et al. 2023, arXiv:2306.15595. llama3 and dynamic (NTK):
        transformers, `modeling_rope_utils.py`.
    """
    _check(position_BT, pairs, theta, length_B, scaling, factor, original, low, high)
    j_F = torch.arange(pairs, dtype=torch.float64, device=position_BT.device)
    frequency_F = scaled_frequencies(torch.pow(theta, -j_F / pairs), scaling, factor, original, low, high)
    angle_BTF = position_BT.to(torch.float64).unsqueeze(-1)
    if scaling == "dynamic":
        assert length_B is not None
        angle_BTF = angle_BTF * (frequency_F * _stretch(length_B, j_F, factor, original)).unsqueeze(1)
    else:
        angle_BTF = angle_BTF * frequency_F
    dtype = torch.float64 if double else torch.float32
    return angle_BTF.cos().to(dtype), angle_BTF.sin().to(dtype)


_UNSCALED = (rope_angles_reference.__defaults__ or ())[2:]  # scaling and its numbers where a call leaves them out


def scaled_frequencies(frequency_F: Tensor, scaling: str, factor: float, original: int, low: float, high: float) -> Tensor:
    """The frequencies as linear and llama3 scaling change them; as they are for the others."""
    if scaling == "linear":
        return frequency_F / factor
    if scaling == "llama3":
        kept_F = ((original * frequency_F / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
        return frequency_F * (kept_F + (1 - kept_F) / factor)
    return frequency_F


def _stretch(length_B: Tensor, j_F: Tensor, factor: float, original: int) -> Tensor:
    """What dynamic scaling multiplies a row's frequencies by, [B, F]: (theta' / theta)^(-j / F) = ratio^(-j / (F - 1)), 1 for one pair."""
    beyond_B = (length_B - original).clamp(min=0)
    ratio_B = 1 + beyond_B.to(torch.float64) * (factor / original)
    return ratio_B.unsqueeze(-1) ** (-j_F / max(j_F.shape[0] - 1, 1))


def _check(
    position_BT: Tensor,
    pairs: int,
    theta: float,
    length_B: Tensor | None,
    scaling: str,
    factor: float,
    original: int,
    low: float,
    high: float,
) -> None:
    op = "rope_angles"
    check_shapes(op, position_BT=position_BT, length_B=length_B)
    check_dtype(op, torch.int64, position_BT=position_BT, length_B=length_B)
    check_that(op, pairs >= 1, lambda: f"pairs is {pairs}, expected at least 1")
    check_that(op, theta > 0, lambda: f"theta is {theta}, expected a positive number")
    if scaling == "none":
        return
    check_that(op, scaling in SCALINGS, lambda: f"scaling is {scaling!r}, expected one of {', '.join(SCALINGS)}")
    check_that(op, factor > 0, lambda: f"factor is {factor}, expected a positive number")
    check_that(op, original >= 1, lambda: f"original is {original}, expected at least 1")
    check_that(op, scaling != "llama3" or low < high, lambda: f"low is {low}, expected less than high, {high}")
    check_that(op, scaling != "dynamic" or length_B is not None, lambda: "dynamic scaling needs length_B")


@torch.library.custom_op("wm::rope_angles", mutates_args=())
def rope_angles(
    position_BT: Tensor,
    pairs: int,
    theta: float,
    double: bool = False,
    length_B: Tensor | None = None,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 1,
    low: float = 1.0,
    high: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """See `rope_angles_reference`."""
    cos_BTF, sin_BTF = rope_angles_reference(position_BT, pairs, theta, double, length_B, scaling, factor, original, low, high)
    return cos_BTF.contiguous(), sin_BTF.contiguous()


@rope_angles.register_fake
def _(
    position_BT: Tensor,
    pairs: int,
    theta: float,
    double: bool = False,
    length_B: Tensor | None = None,
    scaling: str = "none",
    factor: float = 1.0,
    original: int = 1,
    low: float = 1.0,
    high: float = 4.0,
) -> tuple[Tensor, Tensor]:
    _check(position_BT, pairs, theta, length_B, scaling, factor, original, low, high)
    shape = (*position_BT.shape, pairs)
    dtype = torch.float64 if double else torch.float32
    return position_BT.new_empty(shape, dtype=dtype), position_BT.new_empty(shape, dtype=dtype)


@register_kernel(rope_angles, "cuda")
def _(
    position_BT: Tensor, pairs: int, theta: float, double: bool = False, length_B: Tensor | None = None, *given: Any
) -> tuple[Tensor, Tensor]:
    if double or not served() or not position_BT.numel() or position_BT.dtype != torch.int64:
        cos_BTF, sin_BTF = rope_angles._init_fn(position_BT, pairs, theta, double, length_B, *given)
        return cos_BTF, sin_BTF
    from wm_kernels.rope_angles.triton_op import rope_angles_triton

    scaling = (*given, *_UNSCALED[len(given) :])
    return rope_angles_triton(
        position_BT, pairs, theta, length_B, *scaling, check=partial(_check, position_BT, pairs, theta, length_B, *scaling)
    )
