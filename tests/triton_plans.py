"""Plans of typical calls, by op: one for each row of the op's table, wherever it serves.

    python tests/triton_plans.py [--op OP ...] [--dtype bfloat16 ...] [--arch sm_90 ...]

Compiles them, without a GPU, and prints what came of each launch as a line of JSON; all ops, dtypes and architectures by default. Exit
status 1: a program needs more shared memory than its architecture has.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

F32, I64 = torch.float32, torch.int64
DTYPES = ("float32", "float16", "bfloat16")
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes that a program may have
Plans = Iterator[tuple[Any, dict[str, torch.dtype]]]


def residual_rms_norm(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.residual_rms_norm.plan import plan

    names = dict.fromkeys(("x_MD", "residual_MD", "scale_D", "weight_D", "normed_MD", "sum_MD"), dtype)
    for M, D in ((16384, 2048), (64, 20480)):
        yield plan(M, D, dtype, 1e-6, True, D, D, arch), names


def gated_rms_norm(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.gated_rms_norm.plan import plan

    for M, C in ((16384, 2048), (64, 20480)):
        yield plan(M, C, dtype, 1e-6, C, C, arch), dict.fromkeys(("y_MC", "z_MC", "weight_C", "out_MC"), dtype)


def causal_conv1d(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.causal_conv1d.plan import plan

    names = dict.fromkeys(("x_BTC", "weight_CL", "bias_C", "y_BTC"), dtype) | {"before_BYC": F32, "valid_B": I64, "after_BYC": F32}
    for T in (1, 4096):
        state = (3 * 4352, 4352)
        yield plan(4, T, 4352, 4, dtype, (True, True, True), True, (T * 4352, 4352), 4, state, state, arch), names


def rope(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.rope.plan import plan

    names = {"x_BTHP": dtype, "cos_BTF": F32, "sin_BTF": F32, "y_MHP": dtype}
    for T in (4, 4096):
        angles = (T * 64, 64)
        yield plan(2, T, 16, 128, 64, dtype, (T * 2048, 2048, 128), angles, angles, arch), names


def rope_angles(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.rope_angles.plan import plan

    names = {"position_BT": I64, "length_B": I64, "cos_BTF": F32, "sin_BTF": F32}
    for scaling in ("none", "linear", "llama3", "dynamic"):
        yield plan(2, 4096, 64, 10000.0, scaling, 8.0, 4096, 1.0, 4.0, arch), names


def selective_scan(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.selective_scan.plan import plan

    names = dict.fromkeys(("x_BTC", "B_BTN", "C_BTN", "y_BTC"), dtype) | {"valid_B": I64}
    names |= dict.fromkeys(("dt_BTC", "A_CN", "before", "after"), F32)
    for T in (1, 32, 4096):
        tokens = (T * 4096, 4096, T * 4096, 4096, 16, T * 16, 16, T * 16, 16)
        yield plan(2, T, 4096, 16, dtype, (True, True), tokens, (4096 * 16, 16) * 2, arch), names


def ssd_scan(dtype: torch.dtype, arch: str, F: int = 0) -> Plans:
    from wm_kernels.ssd_scan.plan import ScanCall, plan

    names = dict.fromkeys(("dt", "A", "cos", "sin", "state", "out"), F32) | dict.fromkeys(("x", "B", "C", "y"), dtype) | {"valid": I64}
    few, many = (1, 512, 16, 1, 64), ((128, 1, 16, 16, 128), (4, 4096, 16, 16, 128), (1, 65536, 128, 1, 64), (1, 65536, 16, 16, 128))
    for B, T, H, G, P in (few, *many, (1, 65536, 4, 1, 64)):
        N = 128
        call = ScanCall(
            op="ssd_scan_rope" if F else "ssd_scan", arch=arch, dtype=dtype, B=B, T=T, H=H, P=P, G=G, N=N, F=F,
            x_BTH=(T * H * P, H * P, P), dt_BTH=(T * H, H, 1), A_H=(1,), B_BTG=(T * G * N, G * N, N), C_BTG=(T * G * N, G * N, N),
            cos_BT=(T * F, F), sin_BT=(T * F, F), state_BHN=(H * N * P, N * P, P), out_BHN=(H * N * P, N * P, P),
            has_state=True, has_valid=True,
        )  # fmt: skip
        for exact in (False, True) if T == 512 else (False,):
            yield plan(replace(call, exact=exact)), names


def ssd_scan_rope(dtype: torch.dtype, arch: str) -> Plans:
    yield from ssd_scan(dtype, arch, 64)


def attention(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.attention.plan import plan

    B, H, K, P, L = 1, 16, 4, 128, 4096
    names = dict.fromkeys(("q", "k", "v", "new_k", "new_v", "out"), dtype) | {"score": F32, "position": I64}
    for T, (A, scoring), exact in product((1, 512), ((K, "none"), (K, "additive"), (H, "additive")), (False, True)):
        strides = {"q": (T * H * P, H * P, P, 1), "k": (K * L * P, P, L * P, 1), "v": (K * L * P, P, L * P, 1), "score": (A * L, L, 1)}
        strides |= dict.fromkeys(("new_k", "new_v"), (T * K * P, K * P, P, 1))
        yield plan(B, T, H, K, A, P, L, scoring, True, dtype, arch, tuple(strides.items()), exact), names


def attention_rope(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.attention_rope.plan import plan

    B, H, K, P, F, L = 1, 16, 4, 128, 64, 4096
    names = dict.fromkeys(("qkv", "k", "v", "out"), dtype) | {"cos": F32, "sin": F32, "position": I64}
    C = (H + 2 * K) * P
    for T, exact in product((1, 512), (False, True)):
        strides = {"qkv": (T * C, C, 1), "cos": (T * F, F, 1), "sin": (T * F, F, 1)}
        strides |= dict.fromkeys(("k", "v"), (K * L * P, P, L * P, 1))
        yield plan(B, T, H, K, P, F, L, dtype, arch, tuple(strides.items()), exact), names


def keep_window_attention(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.keep_window_attention.plan import Call, plan

    H, K, P, W = 16, 4, 128, 2048
    names = dict.fromkeys(("q", "k", "v", "slot_k", "slot_v", "new_k", "new_v", "out"), dtype)
    names |= dict.fromkeys(("score", "slot_score", "new_score"), F32)
    names |= dict.fromkeys(("slot_position", "new_position", "position", "valid"), I64)
    slot = {name: (K * W * P, W * P, P, 1) for name in ("slot_k", "slot_v", "new_k", "new_v")}
    slot |= {name: (K * W, W, 1) for name in ("slot_score", "slot_position", "new_score", "new_position")}
    for B, T, exact in ((1, 4096, False), (1, 1, False), (64, 1, False), (1, 1, True), (1, 4096, True)):
        token = {"q": (T * H * P, H * P, P, 1), "k": (T * K * P, K * P, P, 1), "v": (T * K * P, K * P, P, 1), "score": (T * K, K, 1)}
        yield plan(Call(B, T, H, K, P, W, True, True, False, dtype, arch, tuple((token | slot).items()), exact)), names


def product_key_topk(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.product_key_topk.plan import plan

    names = {"query_BTR2d": dtype, "keys_RJ2d": dtype, "weight_MRk": dtype, "expert_MRk": I64}
    for T, J in ((16, 128), (4096, 128), (4096, 1024)):
        yield plan(4, T, 4, 64, J, 8, dtype, (T * 512, 512, 64, 256), (J * 128, 128, 64), arch), names


def router_topk(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.router_topk.plan import plan

    names = {"logits_ME": dtype, "weight_Mk": dtype, "expert_Mk": I64}
    for M, E in ((16, 64), (4096, 64), (64, 4096)):
        yield plan(M, E, 8, dtype, False, E, arch), names


def expert_mix(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.expert_mix.plan import plan, spread_plan

    names = dict.fromkeys(("x_BTD", "weight_MQ", "down_ED", "up_ED", "y_MD"), dtype) | {"expert_MQ": I64}
    for T, D in ((2, 2048), (4096, 2048), (4096, 1024)):
        yield plan(4, T, D, 32, dtype, "silu", False, (T * D, D), D, D, arch), names
    names = {"inner_ME": F32, "expert_MQ": I64, "weight_MQ": dtype, "hidden_ME": dtype, "rest_ME": dtype}
    yield spread_plan(8192, 1024, 64, dtype, "silu", False, arch), names


def moe_mix(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.moe_mix.plan import combine_plan, hidden_plan, picks_plan, tiles_plan

    names = dict.fromkeys(("inner_NF", "in_bias_EF", "hidden_NI", "out_ND", "out_bias_ED", "weight_Mk", "y_MD"), dtype)
    names |= dict.fromkeys(("x_MD", "weight_N", "in_EFD", "out_EDI"), dtype) | dict.fromkeys(("expert_N", "expert_Mk", "place_Mk"), I64)
    yield hidden_plan(16384, 512, dtype, True, True, "silu", arch), names
    yield combine_plan(16384, 8, 2048, dtype, True, arch), names
    strides = (1024 * 2048, 2048), (2048 * 512, 512), (1024, 2048)
    yield picks_plan(4, 2, 2048, 512, dtype, True, (True, True), "silu", 2048, *strides, arch), names
    for M in (64, 4096):
        yield tiles_plan(M, 2, 8, 2048, 512, dtype, True, (True, True), "silu", 2048, *strides, arch), names


def linear(dtype: torch.dtype, arch: str) -> Plans:
    from wm_kernels.linear.plan import LinearCall, plan

    names = dict.fromkeys(("x_MK", "weight_NK", "bias_N", "step_bias_H", "a_MA", "b_MB", "c_MC"), dtype) | {"dt_MH": F32}
    mixer, gate, out = (1024, (1024, 1024, 1024, 8), False), (1024, (4096, 0, 0, 0), True), (4096, (1024, 0, 0, 0), False)
    for M, (K, parts, gated) in product((1, 2, 64, 4096), (mixer, gate, out)):
        yield plan(LinearCall(arch, dtype, M, K, parts, gated, not gated, parts[3] > 0)), names


FUNCTIONS = (
    residual_rms_norm, gated_rms_norm, causal_conv1d, rope, rope_angles, selective_scan, ssd_scan, ssd_scan_rope, attention,
    attention_rope, keep_window_attention, product_key_topk, router_topk, expert_mix, moe_mix, linear,
)  # fmt: skip
OPS = {function.__name__: function for function in FUNCTIONS}


def compiled(op: str, dtype: str, arch: str) -> Iterator[dict[str, Any]]:
    """What came of each launch of an op's plans."""
    from wm_kernels.triton_compile import compile_plan

    seen = set()
    for plan, dtypes in OPS[op](getattr(torch, dtype), arch):
        if repr(plan) in seen:
            continue
        seen.add(repr(plan))
        for launch, kernel in zip(plan.launches, compile_plan(plan, dtypes, int(arch.removeprefix("sm_"))), strict=True):
            text = kernel.asm["ptx"]
            yield {
                "op": op,
                "kernel": launch.kernel.fn.__name__,
                "dtype": dtype,
                "arch": arch,
                "target": text.split(".target ")[1].split()[0].rstrip(","),
                "shared": kernel.metadata.shared,
                "wide": sum(map(text.count, ("ld.global.v4", "ld.global.b128", "cp.async.cg", ".v4.b32"))),
                "async": "cp.async.cg" in text,
                "tensor cores": "wgmma" in text,
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--arch", nargs="*", choices=SHARED, default=list(SHARED))
    given, wrong = parser.parse_args(), 0
    for op, dtype, arch in product(given.op, given.dtype, given.arch):
        for found in compiled(op, dtype, arch):
            print(json.dumps(found), flush=True)
            wrong += found["shared"] > SHARED[arch]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
