"""Plans of typical calls, by op: each regime, each row of the table. `python tests/triton_plans.py OP` compiles them for sm_90."""

import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import torch

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
Plans = Iterator[tuple[Any, dict[str, torch.dtype]]]


def rows(op: str, regime: str) -> list[dict[str, Any]]:
    """The values that serve a GPU in a regime."""
    table = json.loads(files("wm_kernels").joinpath(op, "triton_configs.json").read_text(encoding="utf-8"))
    return [row["values"] for row in table if row.get("arch") != "interpreter" and row.get("regime", regime) == regime]


def residual_rms_norm() -> Plans:
    from wm_kernels.residual_rms_norm.plan import plan

    names = dict.fromkeys(("x_MD", "residual_MD", "scale_D", "weight_D", "normed_MD", "sum_MD"), BF16)
    for regime, M, D in (("rows", 16384, 2048), ("wide", 64, 20480)):
        for values in rows("residual_rms_norm", regime):
            yield plan(M, D, BF16, 1e-6, True, D, D, "sm_90", **values), names


def gated_rms_norm() -> Plans:
    from wm_kernels.gated_rms_norm.plan import plan

    names = dict.fromkeys(("y_MC", "z_MC", "weight_C", "out_MC"), BF16)
    for regime, M, C in (("rows", 16384, 2048), ("wide", 64, 20480)):
        for values in rows("gated_rms_norm", regime):
            yield plan(M, C, BF16, 1e-6, C, C, "sm_90", **values), names


def causal_conv1d() -> Plans:
    from wm_kernels.causal_conv1d.plan import plan

    names = {"x_BTC": BF16, "weight_CL": BF16, "bias_C": BF16, "before_BYC": F32, "valid_B": I64, "y_BTC": BF16, "after_BYC": F32}
    for regime, T in (("step", 1), ("tokens", 4096)):
        for values in rows("causal_conv1d", regime):
            state = (3 * 4352, 4352)
            yield plan(4, T, 4352, 4, BF16, (True, True, True), True, (T * 4352, 4352), 4, state, state, "sm_90", **values), names


def rope() -> Plans:
    from wm_kernels.rope.plan import plan

    names = {"x_BTHP": BF16, "cos_BTF": F32, "sin_BTF": F32, "y_MHP": BF16}
    for regime, T in (("few", 4), ("many", 4096)):
        for values in rows("rope", regime):
            angles = (T * 64, 64)
            yield plan(2, T, 16, 128, 64, BF16, (T * 2048, 2048, 128), angles, angles, "sm_90", **values), names


def selective_scan() -> Plans:
    from wm_kernels.selective_scan.plan import plan

    names = {
        "x_BTC": BF16,
        "dt_BTC": F32,
        "A_CN": F32,
        "B_BTN": BF16,
        "C_BTN": BF16,
        "valid_B": I64,
        "before": F32,
        "y_BTC": BF16,
        "after": F32,
    }
    for regime, T in (("step", 1), ("sweep", 32), ("chunks", 4096)):
        for values in rows("selective_scan", regime):
            tokens = (T * 4096, 4096, T * 4096, 4096, 16, T * 16, 16, T * 16, 16)
            yield plan(2, T, 4096, 16, BF16, (True, True), tokens, (4096 * 16, 16) * 2, "sm_90", **values), names


def product_key_topk() -> Plans:
    from wm_kernels.product_key_topk.plan import plan

    names = {"query_BTR2d": BF16, "keys_RJ2d": BF16, "weight_MRk": BF16, "expert_MRk": I64}
    for regime, T in (("few", 16), ("many", 4096)):
        for values in rows("product_key_topk", regime):
            yield plan(4, T, 4, 64, 128, 8, BF16, (T * 512, 512, 64, 256), (128 * 128, 128, 64), "sm_90", **values), names


def router_topk() -> Plans:
    from wm_kernels.router_topk.plan import plan

    names = {"logits_ME": BF16, "weight_Mk": BF16, "expert_Mk": I64}
    for regime, M, E in (("few", 16, 64), ("narrow", 4096, 64), ("wide", 64, 4096)):
        for values in rows("router_topk", regime):
            yield plan(M, E, 8, BF16, False, E, "sm_90", **values), names


def expert_mix() -> Plans:
    from wm_kernels.expert_mix.plan import plan, spread_plan

    names = {"x_BTD": BF16, "expert_MQ": I64, "weight_MQ": BF16, "down_ED": BF16, "up_ED": BF16, "y_MD": BF16}
    for regime, T in (("few", 2), ("many", 4096)):
        for values in rows("expert_mix", regime):
            yield plan(4, T, 2048, 32, BF16, "silu", False, (T * 2048, 2048), 2048, 2048, "sm_90", **values), names
    names = {"inner_ME": F32, "expert_MQ": I64, "weight_MQ": BF16, "hidden_ME": BF16, "rest_ME": BF16}
    for values in rows("expert_mix", "products"):
        yield spread_plan(8192, 1024, 64, BF16, "silu", False, "sm_90", **values), names


def moe_mix() -> Plans:
    from wm_kernels.moe_mix.plan import combine_plan, hidden_plan, picks_plan

    names = {"inner_NF": BF16, "in_bias_EF": BF16, "expert_N": I64, "hidden_NI": BF16, "out_ND": BF16, "out_bias_ED": BF16}
    names |= {"expert_Mk": I64, "weight_Mk": BF16, "place_Mk": I64, "y_MD": BF16}
    for values in rows("moe_mix", "hidden"):
        yield hidden_plan(16384, 512, BF16, True, True, "silu", "sm_90", **values), names
    for values in rows("moe_mix", "combine"):
        yield combine_plan(16384, 8, 2048, BF16, True, "sm_90", **values), names
    names |= {"x_MD": BF16, "weight_N": BF16, "in_EFD": BF16, "out_EDI": BF16}
    for values in rows("moe_mix", "picks"):
        strides = (1024 * 2048, 2048), (2048 * 512, 512), (1024, 2048)
        yield picks_plan(4, 2, 2048, 512, BF16, True, (True, True), "silu", 2048, *strides, "sm_90", **values), names


OPS = {
    function.__name__: function
    for function in (
        residual_rms_norm,
        gated_rms_norm,
        causal_conv1d,
        rope,
        selective_scan,
        product_key_topk,
        router_topk,
        expert_mix,
        moe_mix,
    )
}


def main(op: str) -> None:
    from wm_kernels.triton_compile import compile_plan

    seen = set()
    for plan, dtypes in OPS[op]():
        key = repr(plan)
        if key in seen:
            continue
        seen.add(key)
        for launch, compiled in zip(plan.launches, compile_plan(plan, dtypes, 90), strict=True):
            text = compiled.asm["ptx"]
            wide = text.count("ld.global.v4") + text.count("ld.global.b128") + text.count("cp.async.cg") + text.count(".v4.b32")
            print(launch.kernel.fn.__name__, ".target sm_90" in text, wide)


if __name__ == "__main__":
    main(sys.argv[1])
