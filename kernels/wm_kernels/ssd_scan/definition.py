"""State space duality scan.

B batch   T tokens   H heads   P head dimension   G groups   N state   R = H/G heads of one group
J chunks   Q tokens of one chunk (also its second, source axis: q)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wm_kernels._registration import acc_dtype, check_dtype, check_shapes, check_that, register_kernel, register_reference_autograd
from wm_kernels.triton_support import served

CHUNK = 64  # fastest on CPU for P = N = 64 and 128; longer chunks do more arithmetic, shorter ones more and smaller products


def ssd_scan_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the selective state space recurrence over T tokens.

        S_t = exp(dt_t A) S_{t-1} + B_t ⊗ dt_t x_t        y_t = C_t^T S_t

    Head h reads group h // (H/G) of B and C. T > 1 uses the chunked form, T = 1 the recurrence itself; there is no D and no 1/sqrt(N).

    Args:
        x_BTHP: inputs; any float dtype.
        dt_BTH: step sizes after softplus; not negative; float32, or float64 for float64 x.
        A_H: decay rates; negative; dtype of dt.
        B_BTGN: input maps.
        C_BTGN: output maps.
        state_BHNP: S before the first token, dtype of dt; None is zero.
        valid_B: tokens of each row that count, int64, 0 <= valid <= T; None is T. Later tokens leave the state unchanged
            and their outputs are finite and without meaning.

    Returns:
        (y_BTHP in the dtype of x, state_BHNP after the last valid token in the dtype of dt). Arguments are left unchanged.

    Raises:
        RuntimeError: shapes or dtypes disagree, or H is not a multiple of G; the message names both.

    Source:
        Dao & Gu 2024, arXiv:2405.21060, section 6 (chunks) and eq. (1) (recurrence).
    """
    check_scan("ssd_scan", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)


def scan(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHNP: Tensor | None, valid_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd_scan_reference` without its checks; B and C may already be in the accumulation dtype."""
    acc, (B, T, H, P), N = acc_dtype(x_BTHP.dtype), x_BTHP.shape, B_BTGN.shape[3]
    if valid_B is not None:
        padding_BT = torch.arange(T, device=valid_B.device) >= valid_B.unsqueeze(1)
        dt_BTH = dt_BTH.masked_fill(padding_BT.unsqueeze(-1), 0.0)
    state = x_BTHP.new_zeros((B, H, N, P), dtype=acc) if state_BHNP is None else state_BHNP
    x, b, c = x_BTHP.to(acc), B_BTGN.to(acc), C_BTGN.to(acc)
    y, state = _step(x, dt_BTH, A_H, b, c, state) if T == 1 else _chunked(x, dt_BTH, A_H, b, c, state)
    return y.to(x_BTHP.dtype), state


def _step(x_B1HP: Tensor, dt_B1H: Tensor, A_H: Tensor, B_B1GN: Tensor, C_B1GN: Tensor, state_BHNP: Tensor) -> tuple[Tensor, Tensor]:
    decay_BH11, B_BHN1, dtx_BH1P, C_BH1N = _step_operands(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN)
    state = torch.addcmul(state_BHNP * decay_BH11, B_BHN1, dtx_BH1P)
    return torch.matmul(C_BH1N, state).transpose(1, 2), state


def _step_(x_B1HP: Tensor, dt_B1H: Tensor, A_H: Tensor, B_B1GN: Tensor, C_B1GN: Tensor, state_BHNP: Tensor) -> Tensor:
    """One token of the recurrence, written into the state; returns y_B1HP in the accumulation dtype."""
    decay_BH11, B_BHN1, dtx_BH1P, C_BH1N = _step_operands(x_B1HP, dt_B1H, A_H, B_B1GN, C_B1GN)
    state_BHNP.mul_(decay_BH11).addcmul_(B_BHN1, dtx_BH1P)
    return torch.matmul(C_BH1N, state_BHNP).transpose(1, 2)


def _step_operands(x_B1HP: Tensor, dt_B1H: Tensor, A_H: Tensor, B_B1GN: Tensor, C_B1GN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = x_B1HP.shape[2] // B_B1GN.shape[2]
    dt_BH = dt_B1H[:, 0]
    B_BHN, C_BHN = B_B1GN[:, 0].repeat_interleave(R, 1), C_B1GN[:, 0].repeat_interleave(R, 1)
    decay_BH, dtx_BHP = torch.exp(dt_BH * A_H), dt_BH.unsqueeze(-1) * x_B1HP[:, 0]
    return decay_BH[..., None, None], B_BHN.unsqueeze(-1), dtx_BHP.unsqueeze(-2), C_BHN.unsqueeze(-2)


def _chunked(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHNP: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, H, P), (G, N) = x_BTHP.shape, B_BTGN.shape[2:]
    R, Q = H // G, min(CHUNK, T)
    J = (T + Q - 1) // Q
    dtx = (x_BTHP * dt_BTH.unsqueeze(-1)).reshape(B, T, G, R, P)
    dtx_BGJRQP = _in_chunks(dtx, J, Q).permute(0, 3, 1, 4, 2, 5)
    a_BGJRQ = _in_chunks((dt_BTH * A_H).reshape(B, T, G, R), J, Q).permute(0, 3, 1, 4, 2)
    B_BGJQN = _in_chunks(B_BTGN, J, Q).permute(0, 3, 1, 2, 4)
    C_BGJQN = _in_chunks(C_BTGN, J, Q).permute(0, 3, 1, 2, 4)

    # Within a chunk: attention with the decay between source and target as its mask.
    decay_BGJRQq = _segment_decay(a_BGJRQ)
    score_BGJ1Qq = torch.matmul(C_BGJQN, B_BGJQN.transpose(-1, -2)).unsqueeze(3)
    y_BGJRQP = torch.matmul(score_BGJ1Qq * decay_BGJRQq, dtx_BGJRQP)

    # Between chunks: what each adds to the state, carried to the start of every later chunk and to the end.
    # The heads of a group share B and C, so they go through one product as E = R*P columns.
    tail_BGJRQ = decay_BGJRQq[..., -1, :]
    added_BGJQRP = (dtx_BGJRQP * tail_BGJRQ.unsqueeze(-1)).transpose(3, 4)
    added_BGJEN = torch.matmul(added_BGJQRP.reshape(B, G, J, Q, R * P).transpose(-1, -2), B_BGJQN)
    added_BGRJNP = added_BGJEN.reshape(B, G, J, R, P, N).permute(0, 1, 3, 2, 5, 4)
    start_BGRJNP = _carry(state_BHNP.reshape(B, G, R, N, P), added_BGRJNP, a_BGJRQ.sum(-1).transpose(2, 3))
    before_BGJNE = start_BGRJNP[:, :, :, :-1].permute(0, 1, 3, 4, 2, 5).reshape(B, G, J, N, R * P)
    carried_BGJQRP = torch.matmul(C_BGJQN, before_BGJNE).reshape(B, G, J, Q, R, P)
    head_BGJQR1 = torch.exp(a_BGJRQ.cumsum(-1)).transpose(3, 4).unsqueeze(-1)
    y_BGJQRP = y_BGJRQP.transpose(3, 4) + carried_BGJQRP * head_BGJQR1
    y_BTHP = y_BGJQRP.permute(0, 2, 3, 1, 4, 5).reshape(B, J * Q, H, P)[:, :T]
    return y_BTHP, start_BGRJNP[:, :, :, -1].reshape(B, H, N, P)


def _in_chunks(value: Tensor, J: int, Q: int) -> Tensor:
    """Split the token axis 1 into (J, Q), with zeros after the end: a token with dt x = 0 and dt A = 0 changes nothing."""
    padding = [0, 0] * (value.dim() - 2) + [0, J * Q - value.shape[1]]
    return F.pad(value, padding).unflatten(1, (J, Q))


def _segment_decay(a: Tensor) -> Tensor:
    """exp(a[s+1] + ... + a[t]) at [..., t, s] for s <= t, else 0.

    Each sum is accumulated from its own start: differences of one running sum would cancel after a strong decay.
    """
    Q = a.shape[-1]
    lower = torch.ones((Q, Q), dtype=torch.bool, device=a.device).tril()
    terms = a.unsqueeze(-1).expand(*a.shape, Q).masked_fill(~lower.tril(-1), 0.0)
    return torch.exp(terms.cumsum(-2).masked_fill(~lower, float("-inf")))


def _carry(state_BGRNP: Tensor, added_BGRJNP: Tensor, total_BGRJ: Tensor) -> Tensor:
    """The state at the start of every chunk and, last, after the end: (B, G, R, J + 1, N, P)."""
    parts = torch.cat([state_BGRNP.unsqueeze(3), added_BGRJNP], 3)
    decay = _segment_decay(F.pad(total_BGRJ, [1, 0]))
    return torch.matmul(decay, parts.flatten(4)).reshape(parts.shape)


def scan_(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHNP: Tensor, valid_B: Tensor | None
) -> Tensor:
    """`scan` that writes the new state into `state_BHNP` and returns y_BTHP."""
    if x_BTHP.shape[1] > 1:
        y_BTHP, state = scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
        state_BHNP.copy_(state)
        return y_BTHP
    if valid_B is not None:
        dt_BTH = dt_BTH.masked_fill((valid_B < 1)[:, None, None], 0.0)
    acc = acc_dtype(x_BTHP.dtype)
    return _step_(x_BTHP.to(acc), dt_BTH, A_H, B_BTGN.to(acc), C_BTGN.to(acc), state_BHNP).to(x_BTHP.dtype)


def check_scan(
    op: str,
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> None:
    """One-line errors for the arguments that `ssd_scan` and `ssd_scan_rope` share."""
    size = check_shapes(op, x_BTHP=x_BTHP, dt_BTH=dt_BTH, A_H=A_H, B_BTGN=B_BTGN, C_BTGN=C_BTGN, state_BHNP=state_BHNP, valid_B=valid_B)
    check_dtype(op, acc_dtype(x_BTHP.dtype), dt_BTH=dt_BTH, A_H=A_H, state_BHNP=state_BHNP)
    check_dtype(op, torch.int64, valid_B=valid_B)
    check_that(op, size["H"] % size["G"] == 0, lambda: f"H is {size['H']}, expected a multiple of G = {size['G']}")


def fake_scan(x_BTHP: Tensor, B_BTGN: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shapes and dtypes."""
    B, _, H, P = x_BTHP.shape
    return x_BTHP.new_empty(x_BTHP.shape), x_BTHP.new_empty((B, H, B_BTGN.shape[3], P), dtype=acc_dtype(x_BTHP.dtype))


@torch.library.custom_op("wm::ssd_scan", mutates_args=())
def ssd_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd_scan_reference`."""
    y_BTHP, state = ssd_scan_reference(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return y_BTHP.contiguous(), state.contiguous()


def has_kernel(x_BTHP: Tensor, B_BTGN: Tensor, C_BTGN: Tensor) -> bool:
    """Whether a scan on CUDA goes to the Triton kernels. float64 stays with the reference, which is the oracle there too."""
    return x_BTHP.dim() == 4 and x_BTHP.shape[1] > 0 and x_BTHP.dtype == B_BTGN.dtype == C_BTGN.dtype and served(x_BTHP)


@register_kernel(ssd_scan, "cuda")
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if has_kernel(x_BTHP, B_BTGN, C_BTGN):
        from wm_kernels.ssd_scan.triton_op import ssd_scan_triton

        def check() -> None:
            check_scan("ssd_scan", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)

        return ssd_scan_triton(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B, check=check)
    check_scan("ssd_scan", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    y_BTHP, state = scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return y_BTHP.contiguous(), state.contiguous()


@ssd_scan.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor | None,
    valid_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_scan("ssd_scan", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return fake_scan(x_BTHP, B_BTGN)


register_reference_autograd(ssd_scan, ssd_scan_reference)


@torch.library.custom_op("wm::ssd_scan_", mutates_args=("state_BHNP",))
def ssd_scan_(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    """`ssd_scan` that writes the new state into `state_BHNP`; see `ssd_scan_reference`."""
    check_scan("ssd_scan_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return scan_(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B).contiguous()


@register_kernel(ssd_scan_, "cuda")
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    if has_kernel(x_BTHP, B_BTGN, C_BTGN):
        from wm_kernels.ssd_scan.triton_op import ssd_scan_triton

        def check() -> None:
            check_scan("ssd_scan_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)

        return ssd_scan_triton(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B, check=check, in_place=True)[0]
    check_scan("ssd_scan_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return scan_(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B).contiguous()


@ssd_scan_.register_fake
def _(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHNP: Tensor,
    valid_B: Tensor | None,
) -> Tensor:
    check_scan("ssd_scan_", x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, state_BHNP, valid_B)
    return x_BTHP.new_empty(x_BTHP.shape)
