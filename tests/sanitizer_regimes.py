"""Calls that reach what small ones do not: regimes of large sizes, tiles that are full and those at their edges, work cut into shares.

Sizes are the least that do; tests/test_sanitizer_calls.py says of every regime that it is among them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from native_cases import F32, I64, UNSCALED, declaration, use_with
from native_gpu import values_of
from wm_kernels.triton_launch import Plan

Call = tuple[str, Any, tuple[Any, ...]]
EPS = {"eps": 1e-6}
SCAN = {"P": 70, "N": 80}  # tiles have 16 to 64 columns of P
HEADS = {"H": 8, "K": 2, "P": 80}
SLOTS = ("slot_k_BKWP", "slot_v_BKWP", "slot_score_BKW", "slot_position_BKW", "position_B")
MIX = {"activation": "silu", "weight_inside": False}
WHOLE, NO_STEPS = {"A": 0, "B": 0, "C": 0, "H": 0, "gated": False}, ("step_bias_H",)
GATED = {"activation": "silu", "gated": True}
# op, sizes, plain arguments, absent inputs
SIZES: tuple[tuple[str, dict[str, int], dict[str, Any], tuple[str, ...]], ...] = (
    ("residual_rms_norm", {"M": 3, "D": 512}, EPS, ()),
    ("residual_rms_norm", {"M": 3, "D": 16400}, EPS, ()),
    ("gated_rms_norm", {"M": 3, "C": 512}, EPS, ()),
    ("gated_rms_norm", {"M": 3, "C": 16400}, EPS, ()),
    ("rope", {"B": 1, "T": 9, "H": 9, "P": 72, "F": 32}, {}, ()),
    ("rope", {"B": 2, "T": 140, "H": 40, "P": 72, "F": 32}, {}, ()),
    *(
        ("rope_angles", {"B": 2, "T": T}, {"pairs": 20, "theta": 1e4} | UNSCALED | {"scaling": scaling, "original": 30}, absent)
        for T, scaling, absent in ((1, "none", ("length_B",)), (37, "llama3", ("length_B",)), (37, "dynamic", ()))
    ),
    ("causal_conv1d", {"B": 2, "T": 1, "C": 300, "L": 4, "Y": 3}, {"activation": "silu"}, ()),
    ("causal_conv1d", {"B": 2, "T": 37, "C": 300, "L": 4, "Y": 3}, {"activation": "silu"}, ()),
    ("router_topk", {"M": 600, "E": 60}, {"k": 8, "normalize": True}, ()),
    ("router_topk", {"M": 3, "E": 1100}, {"k": 8, "normalize": True}, ()),
    ("product_key_topk", {"B": 2, "T": 9, "R": 2, "d": 64, "J": 600}, {"k": 8}, ()),
    ("product_key_topk", {"B": 2, "T": 300, "R": 2, "d": 64, "J": 600}, {"k": 8}, ()),
    ("expert_mix", {"B": 1, "T": 2, "R": 2, "k": 9, "D": 8200, "E": 48}, MIX, ()),
    ("expert_mix", {"B": 2, "T": 520, "R": 2, "k": 9, "D": 200, "E": 48}, MIX, ()),
    ("moe_mix", {"M": 3, "k": 2, "D": 600, "E": 8, "I": 70, "F": 140}, GATED, ()),
    ("moe_mix", {"M": 100, "k": 2, "D": 200, "E": 8, "I": 140, "F": 280}, GATED, ()),
    ("moe_mix", {"M": 300, "k": 2, "D": 300, "E": 8, "I": 300, "F": 600}, GATED, ()),
    # Few rows that are no whole programs, tiles with edges on every side; parts that meet inside of a tile.
    *(("linear", {"M": M, "K": 200, "N": 137}, {"A": 70, "B": 30, "C": 30, "H": 7, "gated": False}, ()) for M in (1, 2, 40, 300)),
    *(("linear", {"M": M, "K": 4100, "N": 140}, {**WHOLE, "A": 70, "gated": True}, NO_STEPS) for M in (1, 2, 40, 300)),
    ("selective_scan", {"B": 2, "T": 1, "C": 72, "N": 16}, {}, ()),
    ("selective_scan", {"B": 2, "T": 40, "C": 72, "N": 16}, {}, ()),
    ("selective_scan", {"B": 2, "T": 600, "C": 72, "N": 16}, {}, ()),
    *(
        (op, {"B": B, "T": T, "H": H, "G": G, **SCAN, **({"F": 30} if op == "ssd_scan_rope" else {})}, {}, ())
        for op in ("ssd_scan", "ssd_scan_rope")
        for B, T, H, G in ((2, 1, 4, 2), (1, 130, 2, 1), (1, 4200, 16, 2), (1, 4200, 2, 1))
    ),
    # Programs of one segment are rows, heads and tiles of P, of which float32 has twice as many.
    *(
        (op, {"B": B, "T": 130, "H": H, "G": 8, "P": 64, "N": 64, **({"F": 32} if op == "ssd_scan_rope" else {})}, {}, ())
        for op in ("ssd_scan", "ssd_scan_rope")
        for B, H in ((2, 24), (2, 48), (3, 48))
    ),
    ("attention", {"B": 1, "T": 1, "S": 1100, **HEADS}, {}, ()),
    ("attention", {"B": 1, "T": 150, "S": 1100, **HEADS}, {}, ()),
    *(
        ("attention_rope", {"B": 1, "T": T, "S": 1100, "C": 960, "F": 30, **HEADS}, {"n_head": 8, "n_kv_head": 2, "head_dim": 80}, ())
        for T in (1, 150)
    ),
    *(
        ("scored_attention", {"B": 1, "T": T, "S": 1100, "A": A, **HEADS}, {"scoring": scoring, "ratio": 0.0}, ())
        for T in (1, 150)
        for A, scoring in ((2, "additive"), (8, "binary"))
    ),
    *(("keep_window_attention", {"B": 1, "T": 1, "W": W, **HEADS}, {"window": W}, ()) for W in (100, 600)),
    *(("keep_window_attention", {"B": 1, "T": T, "W": 300, **HEADS}, {"window": 300}, ()) for T in (40, 1100)),
    *(("keep_window_attention", {"B": 1, "T": T, **HEADS}, {"window": 300}, SLOTS) for T in (200, 1100)),
)
LONGEST = 200  # tokens for which exact mode is worth its time: it walks them one by one


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """(name, op or its in-place form, arguments): each of the sizes once."""
    for seed, (op, sizes, plain, absent) in enumerate(SIZES):
        use = use_with(op, dtype, sizes, plain, absent)
        values = dict(values_of(use, sizes, seed, "cpu")) | plain
        has_state = any(output.alias in values for output in declaration(op).outputs if output.alias)
        form = getattr(torch.ops.wm, f"{op}_" if has_state and seed % 2 else op).default
        yield f"{op} {sizes}", form, tuple(values.get(argument.name) for argument in form._schema.arguments)


def plans(dtype: torch.dtype) -> Iterator[tuple[str, Plan, dict[str, Tensor]]]:
    """(name, plan, tensors): launches between matrix products, which are another library's and not called here."""
    from wm_kernels.expert_mix.plan import spread_plan
    from wm_kernels.moe_mix.plan import combine_plan, hidden_plan

    M, k, Q, E, D, I = 5, 3, 70, 1100, 1100, 2100

    def some(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.ones(shape, dtype=kind)

    def index(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=I64)

    spread = {"inner_ME": some(M, E, kind=F32), "expert_MQ": index(M, Q) + E - 1, "weight_MQ": some(M, Q)}
    spread |= {"hidden_ME": some(M, E), "rest_ME": some(M, E)}
    yield "spread", spread_plan(M, E, Q, dtype, "silu", False, "sm_90"), spread
    inner = {"inner_NF": some(M, 2 * I), "in_bias_EF": some(E, 2 * I), "expert_N": index(M) + E - 1, "hidden_NI": some(M, I)}
    yield "hidden", hidden_plan(M, I, dtype, True, True, "silu", "sm_90"), inner
    combine = {"out_ND": some(M * k, D), "out_bias_ED": some(E, D), "expert_Mk": index(M, k) + E - 1, "weight_Mk": some(M, k)}
    combine |= {"place_Mk": index(M, k) + M * k - 1, "y_MD": some(M, D)}
    yield "combine", combine_plan(M, k, D, dtype, True, "sm_90"), combine
