"""`expert_mix` by Triton kernels. B batch, T tokens, D model, E experts, R retrieval heads, k picks, Q = R*k."""

from collections.abc import Mapping

import torch
from torch import Tensor

from wm_kernels.expert_mix.plan import plan, products_at_once, serves_products, spread_plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, not_in_rows, run, strides
from wm_kernels.triton_support import same_rows

_known: dict[tuple[object, ...], Known] = {}


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
    y_BTD = x_BTD.new_empty(x_BTD.shape)
    if exact():  # one row of B*T tokens
        x_BTD = same_rows(x_BTD.reshape(B * T, D)).unsqueeze(0)
    given = {"x_BTD": x_BTD, "expert_MQ": expert_BTRk, "weight_MQ": weight_BTRk, "down_ED": down_ED, "up_ED": up_ED}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x = ready["x_BTD"]
        outer = (0, D) if exact() else strides(x)[:2]
        tables = strides(ready["down_ED"])[0], strides(ready["up_ED"])[0]
        return plan(*x.shape, Q, x.dtype, activation, weight_inside, outer, *tables, architecture(x.device), exact())

    key = (activation, weight_inside, *call_key(x_BTD, expert_BTRk, weight_BTRk, down_ED, up_ED))
    made = known_plan(_known, key, given, make, copied=_copied)
    run(made, {**given, "y_MD": y_BTD})
    return y_BTD


def _copied(name: str, tensor: Tensor) -> bool:
    return not tensor.is_contiguous() if name.endswith("_MQ") else not_in_rows(name, tensor)


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
