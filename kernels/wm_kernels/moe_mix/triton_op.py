"""`moe_mix` by torch's grouped matrix product, with Triton kernels between and after, or by Triton kernels alone.

M tokens   k picks   N = M k picks, sorted by expert   D model   E experts   I inner width   F rows of an expert's input matrix
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from wm_kernels.moe_mix.definition import moe_mix_reference
from wm_kernels.moe_mix.plan import combine_plan, hidden_plan, picks_plan, tiles_plan
from wm_kernels.numerics import exact
from wm_kernels.triton_launch import Known, Plan, architecture, call_key, known_plan, not_in_rows, run, strides
from wm_kernels.triton_support import row_stride, same_rows

MOST_GROUPS = 1023  # of torch's grouped product
GROUPED_ALIGNMENT = 8  # entries: torch's grouped product wants rows of a multiple of 16 bytes

PLANS: dict[str, Callable[..., Plan]] = {"picks": picks_plan, "tiles": tiles_plan}

_known: dict[tuple[object, ...], Known] = {}


def serves_grouped(x_MD: Tensor, out_EDI: Tensor) -> bool:
    """Whether torch's grouped product is a kernel for these: bfloat16 on compute capability 9.0 or later, rows of whole 16 bytes."""
    if x_MD.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm") or out_EDI.shape[0] > MOST_GROUPS:
        return False
    aligned = out_EDI.shape[1] % GROUPED_ALIGNMENT == 0 and out_EDI.shape[2] % GROUPED_ALIGNMENT == 0
    return aligned and torch.cuda.get_device_capability(x_MD.device) >= (9, 0)


def moe_mix_triton(
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
    """See `moe_mix_reference`; float32, float16 or bfloat16.

    In exact mode a token's bits do not depend on the tokens beside it; otherwise the tokens of an expert are joined where they are many.
    """
    run = moe_mix_reference
    if exact() or expert_Mk.numel() <= in_EFD.shape[0]:
        run = moe_mix_picks
    elif serves_grouped(x_MD, out_EDI):
        run = moe_mix_grouped
    elif x_MD.dtype != torch.float32:  # whose products tensor cores do not have
        run = moe_mix_tiles
    return run(x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED, activation, gated)


def moe_mix_grouped(
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
    """See `moe_mix_reference`; nothing waits for the device. The hidden layer is rounded to the dtype of x before and after `act`."""
    (M, k), (E, D, I) = expert_Mk.shape, out_EDI.shape
    expert_N, pick_N = expert_Mk.flatten().sort(stable=True)
    end_E = torch.searchsorted(expert_N, torch.arange(E, device=x_MD.device), right=True, out_int32=True)
    inner_NF = grouped_product(x_MD[pick_N // k], in_EFD, end_E)
    hidden_NI = torch.empty((M * k, I), dtype=x_MD.dtype, device=x_MD.device)
    arch = architecture(x_MD.device)
    tensors = {
        "inner_NF": inner_NF,
        "in_bias_EF": inner_NF if in_bias_EF is None else in_bias_EF.contiguous(),
        "expert_N": expert_N,
        "hidden_NI": hidden_NI,
    }
    run(hidden_plan(M * k, I, x_MD.dtype, gated, in_bias_EF is not None, activation, arch), tensors)
    out_ND = grouped_product(hidden_NI, out_EDI, end_E)
    place_Mk = torch.empty_like(pick_N).scatter_(0, pick_N, torch.arange(M * k, device=x_MD.device))
    y_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype, device=x_MD.device)
    tensors = {
        "out_ND": out_ND,
        "out_bias_ED": out_ND if out_bias_ED is None else out_bias_ED.contiguous(),
        "expert_Mk": expert_Mk.contiguous(),
        "weight_Mk": weight_Mk.contiguous(),
        "place_Mk": place_Mk,
        "y_MD": y_MD,
    }
    run(combine_plan(M, k, D, x_MD.dtype, out_bias_ED is not None, arch), tensors)
    return y_MD


def moe_mix_kernels(
    way: str,
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
    """See `moe_mix_reference`; float32, float16 or bfloat16, by kernels alone. Tensors whose last axis is not contiguous are copied first.

    In the way "picks" every pick reads the matrices of its expert, and a token's bits do not depend on the tokens beside it. In the way
    "tiles" picks are sorted by expert and tiles of them meet its matrices; the hidden layer is rounded to the dtype of x after `act`, as
    are a token's summands (but in float16). Nothing waits for the device, and a call has the same bits each time.
    """
    x_MD = same_rows(x_MD)
    given = {"x_MD": x_MD, "expert_N": expert_Mk, "weight_N": weight_Mk, "in_EFD": in_EFD, "out_EDI": out_EDI}
    # Something stands in for what is not there.
    given |= {"in_bias_EF": x_MD if in_bias_EF is None else in_bias_EF, "out_bias_ED": x_MD if out_bias_ED is None else out_bias_ED}

    def make(ready: Mapping[str, Tensor]) -> Plan:
        x, matrix_in, matrix_out = ready["x_MD"], ready["in_EFD"], ready["out_EDI"]
        (M, k), (_, D, I) = expert_Mk.shape, matrix_out.shape
        experts = {"E": matrix_in.shape[0]} if way == "tiles" else {}
        return PLANS[way](
            **experts,
            M=M,
            k=k,
            D=D,
            I=I,
            dtype=x.dtype,
            gated=gated,
            biases=(in_bias_EF is not None, out_bias_ED is not None),
            activation=activation,
            x_stride=row_stride(x),
            in_strides=strides(matrix_in)[:2],
            out_strides=strides(matrix_out)[:2],
            bias_strides=(strides(ready["in_bias_EF"])[0], strides(ready["out_bias_ED"])[0]),
            arch=architecture(x.device),
        )

    tensors = (x_MD, expert_Mk, weight_Mk, in_EFD, in_bias_EF, out_EDI, out_bias_ED)
    made = known_plan(_known, (way, activation, gated, *call_key(*tensors)), given, make, copied=_copied)
    y_MD = x_MD.new_empty(x_MD.shape)
    run(made, {**given, "y_MD": y_MD})
    return y_MD


moe_mix_picks, moe_mix_tiles = partial(moe_mix_kernels, "picks"), partial(moe_mix_kernels, "tiles")


def _copied(name: str, tensor: Tensor) -> bool:
    return not tensor.is_contiguous() if name.endswith("_N") else not_in_rows(name, tensor)


def grouped_product(rows_NA: Tensor, matrix_EBA: Tensor, end_E: Tensor) -> Tensor:
    """The product of every row with the matrix of its group: rows end_E[e - 1] .. end_E[e] - 1 meet matrix e."""
    matrix_EBA = matrix_EBA if matrix_EBA.stride(-1) == 1 else matrix_EBA.contiguous()
    product: Tensor = torch._grouped_mm(rows_NA.contiguous(), matrix_EBA.transpose(1, 2), offs=end_E)
    return product
