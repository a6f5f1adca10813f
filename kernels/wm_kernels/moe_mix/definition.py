"""Mixture of feed-forward experts.

M tokens   k picks   D model   E experts   I inner width   F rows of an expert's input matrix: I, or 2 I where gated
N picks of one expert
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel
from wm_kernels.expert_mix.definition import ACTIVATIONS
from wm_kernels.triton_support import served

_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}


def moe_mix_reference(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Sum the chosen experts of every token.

        y = sum_k w_k (W_out h + b_out)        h = act(W_in x + b_in)
        gated: h = act(first half of W_in x + b_in) ⊙ second half

    Only the experts that some token chose are read, each once, for all of its tokens together.

    Args:
        x_MD: token vectors.
        expert_Mk: chosen experts, int64, 0 <= e < E; the same expert may appear more than once.
        weight_Mk: their weights; dtype of x, as everything below.
        in_EFD: input matrices; the gate's rows first, then those of what is gated.
        in_bias_EF: their biases, or None.
        out_EDI: output matrices.
        out_bias_ED: their biases, or None.
        activation: "silu" or "gelu" (the exact one).
        gated: whether F is 2 I.

    Returns:
        y_MD in the dtype of x; sums are float32, or float64 for float64.

    Raises:
        RuntimeError: shapes or dtypes disagree, or the activation is unknown; the message names both.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538, eq. (1); gated experts: Jiang et al. 2024, arXiv:2401.04088, section 2.1.
    """
    _check(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated)
    acc, k = acc_dtype(x_MD.dtype), expert_Mk.shape[1]
    y_MD, weight = x_MD.new_zeros(x_MD.shape, dtype=acc), weight_Mk.flatten().to(acc)
    for e, pick_N in _by_expert(expert_Mk, in_EFD.shape[0]):
        row_N = pick_N // k
        rows = _Rows(x_MD[row_N].to(acc), in_EFD[e].to(acc), _row(in_bias_EF, e, acc), activation, gated)
        y_MD.index_add_(0, row_N, weight[pick_N].unsqueeze(1) * _affine(rows.hidden_NI, out_EDI[e].to(acc), _row(out_bias_ED, e, acc)))
    return y_MD.to(x_MD.dtype)


def _by_expert(expert_Mk: Tensor, E: int) -> Iterator[tuple[int, Tensor]]:
    """Every expert that was chosen, with the flat indices of its picks. Waits for the device where that is not the CPU."""
    expert = expert_Mk.flatten()
    counts = torch.bincount(expert, minlength=E).tolist()
    for e, pick_N in enumerate(expert.argsort(stable=True).split(counts)):
        if counts[e]:
            yield e, pick_N


def _row(bias: Tensor | None, e: int, acc: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[e].to(acc)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, matrix, bias)


class _Rows:
    """The tokens of one expert up to its hidden layer."""

    def __init__(self, x_ND: Tensor, in_FD: Tensor, in_bias_F: Tensor | None, activation: str, gated: bool) -> None:
        self.x_ND = x_ND
        inner_NF = _affine(x_ND, in_FD, in_bias_F)
        gate_NI, *self.gated = inner_NF.chunk(2, -1) if gated else (inner_NF,)
        self.gate_NI = gate_NI
        self.active_NI = ACTIVATIONS[activation](gate_NI)
        self.hidden_NI = self.active_NI * self.gated[0] if gated else self.active_NI

    def backward(self, grad_NI: Tensor, activation: str) -> Tensor:
        """The gradient of W_in x + b_in, from that of the hidden layer."""
        slope = _SLOPES[activation]
        if not self.gated:
            return slope(grad_NI, self.gate_NI)
        return torch.cat([slope(grad_NI * self.gated[0], self.gate_NI), grad_NI * self.active_NI], -1)


def _gathered(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """`moe_mix_reference` for few tokens on a device that must not be waited for: a copy of the matrices of every pick."""
    acc = acc_dtype(x_MD.dtype)
    inner_MkF = torch.matmul(in_EFD[expert_Mk].to(acc), x_MD.to(acc)[:, None, :, None]).squeeze(-1)
    if in_bias_EF is not None:
        inner_MkF = inner_MkF + in_bias_EF[expert_Mk]
    gate_MkI, *rest = inner_MkF.chunk(2, -1) if gated else (inner_MkF,)
    hidden_MkI = ACTIVATIONS[activation](gate_MkI)
    if gated:
        hidden_MkI = hidden_MkI * rest[0]
    out_MkD = torch.matmul(out_EDI[expert_Mk].to(acc), hidden_MkI.unsqueeze(-1)).squeeze(-1)
    if out_bias_ED is not None:
        out_MkD = out_MkD + out_bias_ED[expert_Mk]
    return torch.matmul(weight_Mk.to(acc).unsqueeze(1), out_MkD).squeeze(1).to(x_MD.dtype)


def _check(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> None:
    op = "moe_mix"
    size = check_shapes(
        op,
        x_MD=x_MD,
        expert_Mk=expert_Mk,
        weight_Mk=weight_Mk,
        in_EFD=in_EFD,
        in_bias_EF=in_bias_EF,
        out_EDI=out_EDI,
        out_bias_ED=out_bias_ED,
    )
    floats = {"weight_Mk": weight_Mk, "in_EFD": in_EFD, "in_bias_EF": in_bias_EF, "out_EDI": out_EDI, "out_bias_ED": out_bias_ED}
    check_dtype(op, x_MD.dtype, **floats)
    check_dtype(op, torch.int64, expert_Mk=expert_Mk)
    rows = "2 I" if gated else "I"
    check_that(
        op, size["F"] == size["I"] * (2 if gated else 1), lambda: f"F is {size['F']}, expected {rows} for I = {size['I']}, gated = {gated}"
    )
    check_that(op, activation in ACTIVATIONS, lambda: f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


@torch.library.custom_op("wm::moe_mix", mutates_args=())
def moe_mix(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """See `moe_mix_reference`."""
    _check(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated)
    # At most a copy of the whole table; on the CPU, reading which experts were chosen costs nothing.
    few = x_MD.device.type != "cpu" and expert_Mk.numel() <= in_EFD.shape[0]
    run = _gathered if few else moe_mix_reference
    return run(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated).contiguous()


@register_kernel(moe_mix, "cuda")
def _(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    _check(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated)
    run = _gathered if expert_Mk.numel() <= in_EFD.shape[0] else moe_mix_reference
    if served(x_MD) and x_MD.numel() and expert_Mk.numel():
        from wm_kernels.moe_mix.triton_op import moe_mix_triton as run
    return run(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated).contiguous()


@moe_mix.register_fake
def _(
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    _check(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated)
    return x_MD.new_empty(x_MD.shape)


# The reference groups tokens by values that a traced backward pass does not have, so its gradient is an op of its own.
@torch.library.custom_op("wm::moe_mix_backward", mutates_args=())
def moe_mix_backward(
    grad_MD: Tensor,
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> list[Tensor]:
    """The gradients of x, the weights, the two matrices and the biases that are given, in the order of `moe_mix`."""
    acc, k = acc_dtype(x_MD.dtype), expert_Mk.shape[1]
    weight = weight_Mk.flatten().to(acc)
    given = (x_MD, weight, in_EFD, in_bias_EF, out_EDI, out_bias_ED)
    found = [None if value is None else torch.zeros_like(value, dtype=acc, memory_format=torch.contiguous_format) for value in given]
    grad_x, grad_weight, grad_in, grad_in_bias, grad_out, grad_out_bias = found
    assert grad_x is not None
    assert grad_weight is not None
    assert grad_in is not None
    assert grad_out is not None
    for e, pick_N in _by_expert(expert_Mk, in_EFD.shape[0]):
        row_N = pick_N // k
        in_FD, out_DI, out_bias_D = in_EFD[e].to(acc), out_EDI[e].to(acc), _row(out_bias_ED, e, acc)
        rows = _Rows(x_MD[row_N].to(acc), in_FD, _row(in_bias_EF, e, acc), activation, gated)
        up_ND = grad_MD[row_N].to(acc)
        grad_weight[pick_N] = (up_ND * _affine(rows.hidden_NI, out_DI, out_bias_D)).sum(-1)
        up_ND = up_ND * weight[pick_N].unsqueeze(1)
        inner_NF = rows.backward(up_ND @ out_DI, activation)
        grad_out[e], grad_in[e] = up_ND.mT @ rows.hidden_NI, inner_NF.mT @ rows.x_ND
        if grad_out_bias is not None:
            grad_out_bias[e] = up_ND.sum(0)
        if grad_in_bias is not None:
            grad_in_bias[e] = inner_NF.sum(0)
        grad_x.index_add_(0, row_N, inner_NF @ in_FD)
    found[1] = grad_weight.view(weight_Mk.shape)
    return [value.to(x_MD.dtype) for value in found if value is not None]


@moe_mix_backward.register_fake
def _(
    grad_MD: Tensor,
    x_MD: Tensor,
    expert_Mk: Tensor,
    weight_Mk: Tensor,
    in_EFD: Tensor,
    in_bias_EF: Tensor | None,
    out_EDI: Tensor,
    out_bias_ED: Tensor | None,
    activation: str,
    gated: bool,
) -> list[Tensor]:
    given = (x_MD, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED)
    return [value.new_empty(value.shape) for value in given if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.gated = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = iter(torch.ops.wm.moe_mix_backward(grad_MD, *saved, ctx.activation, ctx.gated))
    grads = [None if value is None or not value.is_floating_point() else next(found) for value in saved]
    return (*grads, None, None)


moe_mix.register_autograd(_backward, setup_context=_setup_context)
