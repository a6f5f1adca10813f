"""`expert_mix` by Triton kernels. B batch, T tokens, D model, E experts, R retrieval heads, k picks, Q = R*k."""

import torch
from torch import Tensor

from wm_kernels.expert_mix.plan import plan, products_at_once, serves_products, spread_plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import architecture, run, strides
from wm_kernels.triton_support import inner_contiguous, rows_of


def expert_mix_triton(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    """See `expert_mix_reference`; float32, float16 or bfloat16. Rows whose entries do not follow each other are copied first.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise many tokens are summed in other orders than few.
    """
    (B, T, D), Q = x_BTD.shape, expert_BTRk.shape[2] * expert_BTRk.shape[3]
    tables = {down_ED.dtype, up_ED.dtype}
    if not exact() and tables == {x_BTD.dtype} and serves_products(B * T, D, down_ED.shape[0], Q, x_BTD.dtype):
        return expert_mix_products(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED, activation, weight_inside)
    x_BTD, down_ED, up_ED = (inner_contiguous(tensor) for tensor in (x_BTD, down_ED, up_ED))
    y_BTD = torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=x_BTD.device)
    x_strides = strides(x_BTD)
    if exact():  # one row of B*T tokens
        x_BTD, stride = rows_of(x_BTD.reshape(B * T, D))
        B, T, x_strides = 1, B * T, (0, stride, 1)
    made = plan(
        B,
        T,
        D,
        Q,
        x_BTD.dtype,
        activation,
        weight_inside,
        (x_strides[0], x_strides[1]),
        strides(down_ED)[0],
        strides(up_ED)[0],
        architecture(x_BTD.device),
        exact(),
    )
    tensors = {
        "x_BTD": x_BTD,
        "expert_MQ": expert_BTRk.contiguous(),
        "weight_MQ": weight_BTRk.contiguous(),
        "down_ED": down_ED,
        "up_ED": up_ED,
        "y_MD": y_BTD,
    }
    run(made, tensors)
    return y_BTD


def expert_mix_products(
    x_BTD: Tensor,
    expert_BTRk: Tensor,
    weight_BTRk: Tensor,
    down_ED: Tensor,
    up_ED: Tensor,
    activation: str,
    weight_inside: bool,
) -> Tensor:
    """See `expert_mix_reference`; by products with all experts, for finite tables of the tokens' dtype, some thousand tokens at a time.

    Memory beside the result: three values of every expert and token at hand, `plan.PRODUCT_BYTES` twice.
    """
    E, (_, _, D) = down_ED.shape[0], x_BTD.shape
    x_MD = x_BTD.reshape(-1, D)
    M, Q = x_MD.shape[0], expert_BTRk.shape[2] * expert_BTRk.shape[3]
    expert_MQ, weight_MQ = expert_BTRk.contiguous().view(M, Q), weight_BTRk.contiguous().view(M, Q)
    y_MD = torch.empty((M, D), dtype=x_MD.dtype, device=x_MD.device)
    at_once = min(M, products_at_once(E))
    inner_ME = torch.empty((at_once, E), dtype=torch.float32, device=x_MD.device)
    hidden_ME, rest_ME = torch.empty((2, at_once, E), dtype=x_MD.dtype, device=x_MD.device).unbind(0)
    arch = architecture(x_MD.device)
    for first in range(0, M, at_once):
        some = slice(first, min(first + at_once, M))
        count = some.stop - first
        tensors = {"inner_ME": inner_ME[:count], "expert_MQ": expert_MQ[some], "weight_MQ": weight_MQ[some]}
        tensors |= {"hidden_ME": hidden_ME[:count], "rest_ME": rest_ME[:count]}
        _wide_product(x_MD[some], down_ED.t(), tensors["inner_ME"])
        run(spread_plan(count, E, Q, x_MD.dtype, activation, weight_inside, arch), tensors)
        torch.mm(tensors["rest_ME"], up_ED, out=y_MD[some])
        y_MD[some].addmm_(tensors["hidden_ME"], up_ED)
    return y_MD.view(x_BTD.shape)


def _wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, float32 from operands of half precision without a float32 copy of them where the device can."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)
