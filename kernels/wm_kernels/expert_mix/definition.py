"""Mixture of one-neuron experts.

B batch   T tokens   M = B*T   D model   E experts   R retrieval heads   k picks   Q = R*k picks of one token
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel, register_reference_autograd, spans
from wm_kernels.triton_support import served

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
GATHERED_ELEMENTS = 2**21  # entries of one table gathered at a time: 8 MB in float32, about a core's share of cache


def expert_mix_reference(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    """Sum the chosen experts of every token, over retrieval heads and picks.

        y = sum_{r, k} act(x · down_e) w up_e        weight outside (PEER, and Cheems of December 2024)
        y = sum_{r, k} act(w (x · down_e)) up_e      weight inside (Cheems of November 2024)

    Args:
        x_BTD: token vectors.
        expert_BTRk: chosen experts, int64, 0 <= e < E; the same expert may appear more than once.
        weight_BTRk: their weights.
        down_ED: input row of every expert.
        up_ED: output row of every expert.
        activation: "silu", or "gelu" in its exact form with erf.
        weight_inside: the weight scales the activation's argument instead of its value.

    Returns:
        y_BTD in the dtype of x; sums are float32, or float64 for float64.

    Raises:
        RuntimeError: shapes disagree, or the activation is unknown; the message names both.

    Source:
        He 2024, PEER, arXiv:2407.04153, eq. (2); arXiv:2412.11834.
    """
    _check(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation)
    act = ACTIVATIONS[activation]
    x_MD, expert_MQ, weight_MQ = x_BTD.flatten(0, 1), expert_BTRk.flatten(0, 1).flatten(1), weight_BTRk.flatten(0, 1).flatten(1)
    parts = [
        _mix(x_MD[m:end], expert_MQ[m:end], weight_MQ[m:end], down_ED, up_ED, act, weight_inside)
        for m, end in spans(x_MD.shape[0], expert_MQ.shape[1] * x_MD.shape[1], GATHERED_ELEMENTS)
    ]
    return torch.cat(parts).view(x_BTD.shape)


def _mix(
    x_MD: Tensor,
    expert_MQ: Tensor,
    weight_MQ: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    act: Callable[[Tensor], Tensor],
    weight_inside: bool,
) -> Tensor:
    acc = acc_dtype(x_MD.dtype)
    weight_MQ = weight_MQ.to(acc)
    inner_MQ = torch.matmul(F.embedding(expert_MQ, down_ED).to(acc), x_MD.to(acc).unsqueeze(-1)).squeeze(-1)
    hidden_MQ = act(weight_MQ * inner_MQ) if weight_inside else act(inner_MQ) * weight_MQ
    return torch.matmul(hidden_MQ.unsqueeze(-2), F.embedding(expert_MQ, up_ED).to(acc)).squeeze(-2).to(x_MD.dtype)


def _check(x_BTD: Tensor, expert_BTRk: Tensor, weight_BTRk: Tensor, down_ED: Tensor, up_ED: Tensor, activation: str) -> None:
    check_shapes("expert_mix", x_BTD=x_BTD, expert_BTRk=expert_BTRk, weight_BTRk=weight_BTRk, down_ED=down_ED, up_ED=up_ED)
    check_dtype("expert_mix", torch.int64, expert_BTRk=expert_BTRk)
    check_that("expert_mix", activation in ACTIVATIONS, lambda: f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


@torch.library.custom_op("wm::expert_mix", mutates_args=())
def expert_mix(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    """See `expert_mix_reference`."""
    return expert_mix_reference(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation, weight_inside).contiguous()


@register_kernel(expert_mix, "cuda")
def _(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    _check(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation)
    if not served(x_BTD, weight_BTRk, down_ED, up_ED) or not expert_BTRk.numel() or not x_BTD.numel():
        return expert_mix_reference(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation, weight_inside).contiguous()
    from wm_kernels.expert_mix.triton_op import expert_mix_triton

    return expert_mix_triton(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation, weight_inside)


@expert_mix.register_fake
def _(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    _check(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation)
    return x_BTD.new_empty(x_BTD.shape)


register_reference_autograd(expert_mix, expert_mix_reference)
