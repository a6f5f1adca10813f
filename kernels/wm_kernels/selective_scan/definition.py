"""Selective scan of Mamba-1.

B batch   T tokens   C channels   N state   Q tokens of one span
"""

from typing import Any

import torch
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, register_kernel, spans
from wm_kernels.triton_support import served

SPAN_ELEMENTS = 2**18  # entries of one span's states: 1 MB in float32, so that a span's tensors stay in cache


def selective_scan_reference(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run Mamba-1's recurrence over T tokens; every channel has N decays of its own.

        S_t = exp(dt_t A) * S_{t-1} + dt_t x_t ⊗ B_t        y_t = S_t C_t

    There is no D: the caller adds the skip. States are made one span of tokens at a time, so memory does not grow with T * C * N.

    Args:
        x_BTC: inputs; any float dtype.
        dt_BTC: step sizes after softplus; not negative; float32, or float64 for float64 x.
        A_CN: decay rates; negative; dtype of dt.
        B_BTN: input map, shared by the channels.
        C_BTN: output map, shared by the channels.
        state_BCN: S before the first token, dtype of dt; None is zero.
        valid_B: tokens of each row that count, int64, 0 <= valid <= T; None is T. Later tokens leave the state unchanged
            and their outputs are finite and without meaning.

    Returns:
        (y_BTC in the dtype of x, state_BCN after the last valid token in the dtype of dt). Arguments are left unchanged.

    Raises:
        RuntimeError: shapes or dtypes disagree; the message names both.

    Source:
        Gu & Dao 2023, arXiv:2312.00752, algorithm 2 with the discretisation of its section 3.1, B by Euler's rule.
    """
    _check("selective_scan", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
    state = None if state_BCN is None else state_BCN.clone()
    return _scan(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state, valid_B)


def _scan(
    x_BTC: Tensor, dt_BTC: Tensor, A_CN: Tensor, B_BTN: Tensor, C_BTN: Tensor, state_BCN: Tensor | None, valid_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence; a given state is overwritten and returned."""
    acc, (B, T, C), N = acc_dtype(x_BTC.dtype), x_BTC.shape, A_CN.shape[1]
    if state_BCN is None:
        state_BCN = x_BTC.new_zeros((B, C, N), dtype=acc)
    dt, x, b, c = _without_padding(dt_BTC, valid_B), x_BTC.to(acc), B_BTN.to(acc), C_BTN.to(acc)
    if T == 1:
        dt_BC1 = dt[:, 0].unsqueeze(-1)
        state_BCN.mul_(torch.exp(dt_BC1 * A_CN)).addcmul_(dt_BC1 * x[:, 0].unsqueeze(-1), b)
        return torch.matmul(state_BCN, c.transpose(1, 2)).transpose(1, 2).to(x_BTC.dtype), state_BCN
    # Channels last: N is small, and rows of N entries would be slow to broadcast over.
    A_NC, state_BNC, parts = A_CN.t().contiguous(), state_BCN.transpose(1, 2).contiguous(), []
    for t, end in spans(T, B * C * N, SPAN_ELEMENTS):
        states_BQNC, _ = _states(x[:, t:end], dt[:, t:end], A_NC, b[:, t:end], state_BNC)
        parts.append(torch.matmul(c[:, t:end].unsqueeze(2), states_BQNC).squeeze(2))
        state_BNC = states_BQNC[:, -1]
    return torch.cat(parts, 1).to(x_BTC.dtype), state_BCN.copy_(state_BNC.transpose(1, 2))


def _without_padding(dt_BTC: Tensor, valid_B: Tensor | None) -> Tensor:
    """dt = 0 past the end of a row: exp(0 A) = 1 keeps the state and dt x = 0 adds nothing."""
    if valid_B is None:
        return dt_BTC
    padding_BT = torch.arange(dt_BTC.shape[1], device=valid_B.device) >= valid_B.unsqueeze(1)
    return dt_BTC.masked_fill(padding_BT.unsqueeze(-1), 0.0)


def _states(x_BQC: Tensor, dt_BQC: Tensor, A_NC: Tensor, B_BQN: Tensor, state_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """The state after every token of a span, and the decay that led to it."""
    decay_BQNC = torch.exp(dt_BQC.unsqueeze(2) * A_NC)
    states_BQNC = (dt_BQC * x_BQC).unsqueeze(2) * B_BQN.unsqueeze(3)
    for q in range(x_BQC.shape[1]):
        state_BNC = states_BQNC[:, q].addcmul_(decay_BQNC[:, q], state_BNC)
    return states_BQNC, decay_BQNC


def _check(
    op: str,
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> None:
    check_shapes(op, x_BTC=x_BTC, dt_BTC=dt_BTC, A_CN=A_CN, B_BTN=B_BTN, C_BTN=C_BTN, state_BCN=state_BCN, valid_B=valid_B)
    check_dtype(op, acc_dtype(x_BTC.dtype), dt_BTC=dt_BTC, A_CN=A_CN, state_BCN=state_BCN)
    check_dtype(op, torch.int64, valid_B=valid_B)


@torch.library.custom_op("wm::selective_scan", mutates_args=())
def selective_scan(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`."""
    y_BTC, state = selective_scan_reference(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
    return y_BTC.contiguous(), state.contiguous()


@register_kernel(selective_scan, "cuda")
def _(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not served(x_BTC, B_BTN, C_BTN):
        y_BTC, state = selective_scan_reference(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
        return y_BTC.contiguous(), state.contiguous()
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    def check() -> None:
        _check("selective_scan", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)

    return selective_scan_triton(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B, check=check)


@selective_scan.register_fake
def _(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check("selective_scan", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
    B, _, C = x_BTC.shape
    return x_BTC.new_empty(x_BTC.shape), x_BTC.new_empty((B, C, A_CN.shape[1]), dtype=acc_dtype(x_BTC.dtype))


@torch.library.custom_op("wm::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad_y_BTC: Tensor,
    grad_state_BCN: Tensor,
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of `selective_scan` by the recurrence backwards, one span of states at a time.

        G_t = exp(dt_{t+1} A) * G_{t+1} + grad_y_t ⊗ C_t        the gradient of S_t

    It is an op of its own because a compiler that traced the loop over tokens would fix T and unroll it.

    Returns:
        The gradients of x, dt, A, B, C and the state, each of its argument's dtype.
    """
    acc, (B, T, C), N = acc_dtype(x_BTC.dtype), x_BTC.shape, A_CN.shape[1]
    dt, x, b, c, grad_y = _without_padding(dt_BTC, valid_B), x_BTC.to(acc), B_BTN.to(acc), C_BTN.to(acc), grad_y_BTC.to(acc)
    A_NC = A_CN.t().contiguous()
    state_BNC = x.new_zeros((B, N, C)) if state_BCN is None else state_BCN.transpose(1, 2).contiguous()
    cuts, starts = spans(T, B * C * N, SPAN_ELEMENTS), [state_BNC]
    for t, end in cuts[:-1]:
        # A view would keep all states of the span.
        starts.append(_states(x[:, t:end], dt[:, t:end], A_NC, b[:, t:end], starts[-1])[0][:, -1].clone())

    grad_x, grad_dt, grad_b, grad_c, grad_A_NC = (torch.zeros_like(v) for v in (x, dt, b, c, A_NC))
    carried_BNC = grad_state_BCN.to(acc).transpose(1, 2)
    for (t, end), start_BNC in zip(reversed(cuts), reversed(starts), strict=True):
        x_BQC, dt_BQC, gy_BQC = x[:, t:end], dt[:, t:end], grad_y[:, t:end]
        states_BQNC, decay_BQNC = _states(x_BQC, dt_BQC, A_NC, b[:, t:end], start_BNC)
        grad_BQNC = c[:, t:end].unsqueeze(3) * gy_BQC.unsqueeze(2)
        for q in reversed(range(end - t)):
            carried_BNC = grad_BQNC[:, q].add_(carried_BNC) * decay_BQNC[:, q]
        grad_c[:, t:end] = torch.matmul(states_BQNC, gy_BQC.unsqueeze(-1)).squeeze(-1)
        grad_b[:, t:end] = torch.matmul(grad_BQNC, (dt_BQC * x_BQC).unsqueeze(-1)).squeeze(-1)
        # Through dt x, then through the exponent dt A.
        grad_dtx_BQC = torch.matmul(b[:, t:end].unsqueeze(2), grad_BQNC).squeeze(2)
        before_BQNC = torch.cat([start_BNC.unsqueeze(1), states_BQNC[:, :-1]], 1)
        grad_dtA_BQNC = before_BQNC.mul_(decay_BQNC).mul_(grad_BQNC)
        grad_x[:, t:end] = grad_dtx_BQC * dt_BQC
        grad_dt[:, t:end] = grad_dtx_BQC * x_BQC + (grad_dtA_BQNC * A_NC).sum(2)
        grad_A_NC += (grad_dtA_BQNC * dt_BQC.unsqueeze(2)).sum((0, 1))
    return (
        grad_x.to(x_BTC.dtype),
        _without_padding(grad_dt, valid_B),
        grad_A_NC.t().contiguous(),
        grad_b.to(B_BTN.dtype),
        grad_c.to(C_BTN.dtype),
        carried_BNC.transpose(1, 2).contiguous(),
    )


@selective_scan_backward.register_fake
def _(
    grad_y_BTC: Tensor,
    grad_state_BCN: Tensor,
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, b, c, state = (v.new_empty(v.shape) for v in (x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, grad_state_BCN))
    return x, dt, A, b, c, state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y_BTC: Tensor, grad_state_BCN: Tensor) -> tuple[Tensor | None, ...]:
    state_BCN = ctx.saved_tensors[5]
    *grads, grad_start = selective_scan_backward(grad_y_BTC, grad_state_BCN, *ctx.saved_tensors)
    return *grads, None if state_BCN is None else grad_start, None


selective_scan.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("wm::selective_scan_", mutates_args=("state_BCN",))
def selective_scan_(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    """`selective_scan` that writes the new state into `state_BCN`; see `selective_scan_reference`."""
    _check("selective_scan_", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
    return _scan(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)[0].contiguous()


@register_kernel(selective_scan_, "cuda")
def _(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    def check() -> None:
        _check("selective_scan_", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)

    if not served(x_BTC, B_BTN, C_BTN):
        check()
        return _scan(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)[0].contiguous()
    from wm_kernels.selective_scan.triton_op import selective_scan_triton

    return selective_scan_triton(x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B, state_BCN, check)[0]


@selective_scan_.register_fake
def _(
    x_BTC: Tensor,
    dt_BTC: Tensor,
    A_CN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    state_BCN: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    _check("selective_scan_", x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, valid_B)
    return x_BTC.new_empty(x_BTC.shape)
