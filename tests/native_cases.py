"""Calls of every op that travels: uses as graphs make them, and what eager launches for the same tensors.

Tensors lie on the meta device: launches depend on no value, and sizes may be as large as they come.
"""

from typing import Any

import torch

from wm_kernels.native import Native, Use, shape_of
from wm_kernels.native_ops import native_op

F32, I64 = torch.float32, torch.int64
FLOATS = {"dt", "A", "cos", "sin", "state", "score", "slot_score", "cache_score"}  # of float32, whatever the model's dtype
INTEGERS = {"valid", "position", "expert", "slot_position", "length"}
UNKNOWN = "BTMS"  # letters that calls bind
UNSCALED = {"double": False, "scaling": "none", "factor": 1.0, "original": 1, "low": 1.0, "high": 4.0}
SCAN = {"H": 16, "P": 64, "G": 16, "N": 64}
HEADS = {"H": 16, "K": 8, "P": 64}
CONFIGURATIONS: dict[str, list[tuple[dict[str, int], dict[str, Any], tuple[str, ...]]]] = {
    # sizes that a model fixes, plain arguments, absent inputs
    "residual_rms_norm": [({"D": 1024}, {"eps": 1e-6}, ()), ({"D": 24}, {"eps": 1e-5}, ("scale_D",)), ({"D": 20480}, {"eps": 1e-6}, ())],
    "gated_rms_norm": [({"C": 2048}, {"eps": 1e-5}, ()), ({"C": 72}, {"eps": 1e-5}, ())],
    "rope": [({"H": 16, "P": 64, "F": 32}, {}, ()), ({"H": 3, "P": 24, "F": 4}, {}, ())],
    "causal_conv1d": [
        ({"C": 4352, "L": 4, "Y": 3}, {"activation": "silu"}, ()),
        ({"C": 40, "L": 2, "Y": 1}, {"activation": "none"}, ("bias_C", "valid_B")),
    ],
    "rope_angles": [
        ({}, {"pairs": 64, "theta": 10000.0} | UNSCALED, ("length_B",)),
        ({}, {"pairs": 10, "theta": 12345.678901} | UNSCALED | {"scaling": "dynamic", "factor": 2.0, "original": 300}, ()),
    ],
    "router_topk": [({"E": 64}, {"k": 8, "normalize": True}, ()), ({"E": 2048}, {"k": 3, "normalize": False}, ())],
    "product_key_topk": [({"R": 4, "d": 64, "J": 64}, {"k": 8}, ()), ({"R": 1, "d": 8, "J": 1024}, {"k": 3}, ())],
    "expert_mix": [
        ({"R": 4, "k": 8, "D": 1024, "E": 4096}, {"activation": "silu", "weight_inside": False}, ()),
        ({"R": 1, "k": 3, "D": 24, "E": 16}, {"activation": "none", "weight_inside": True}, ()),
    ],
    "moe_mix": [
        ({"k": 2, "D": 1024, "E": 8, "I": 512, "F": 1024}, {"activation": "silu", "gated": True}, ("in_bias_EF", "out_bias_ED")),
        ({"k": 3, "D": 24, "E": 4, "I": 40, "F": 40}, {"activation": "none", "gated": False}, ()),
    ],
    "linear": [
        ({"K": 1024, "N": 3080}, {"A": 1024, "B": 1024, "C": 1024, "H": 8, "gated": False}, ("bias_N",)),
        ({"K": 1024, "N": 8192}, {"A": 4096, "B": 0, "C": 0, "H": 0, "gated": True}, ("bias_N", "step_bias_H")),
        ({"K": 4096, "N": 1024}, {"A": 1024, "B": 0, "C": 0, "H": 0, "gated": False}, ("bias_N", "step_bias_H")),
        ({"K": 40, "N": 77}, {"A": 20, "B": 0, "C": 50, "H": 7, "gated": False}, ()),
        ({"K": 72, "N": 90}, {"A": 45, "B": 0, "C": 0, "H": 0, "gated": True}, ("step_bias_H",)),
    ],
    "selective_scan": [({"C": 2048, "N": 16}, {}, ()), ({"C": 48, "N": 5}, {}, ("valid_B",))],
    "ssd_scan": [({**SCAN, "H": 32, "G": 1, "N": 128}, {}, ()), ({"H": 3, "P": 20, "G": 1, "N": 12}, {}, ("valid_B",))],
    "ssd_scan_rope": [({**SCAN, "F": 32}, {}, ()), ({"H": 4, "P": 16, "G": 2, "N": 16, "F": 8}, {}, ())],
    "attention": [(HEADS, {}, ()), ({"H": 3, "K": 1, "P": 80}, {}, ("valid_B",)), ({"H": 32, "K": 32, "P": 256}, {}, ())],
    "attention_rope": [
        ({"C": 2048, "F": 32, "K": 8, "P": 64}, {"n_head": 16, "n_kv_head": 8, "head_dim": 64}, ()),
        ({"C": 100, "F": 8, "K": 1, "P": 20}, {"n_head": 3, "n_kv_head": 1, "head_dim": 20}, ()),
    ],
    "scored_attention": [
        ({**HEADS, "A": 8}, {"scoring": "additive", "ratio": 0.0}, ()),
        ({**HEADS, "A": 16}, {"scoring": "binary", "ratio": 0.0}, ("valid_B",)),
    ],
    "keep_window_attention": [
        ({**HEADS, "W": 2048}, {"window": 2048}, ()), ({"H": 4, "K": 2, "P": 20, "W": 24}, {"window": 24}, ("valid_B",))
    ],
}  # fmt: skip


def declaration(op: str) -> Native:
    """The op's."""
    found = native_op(op)
    assert found is not None
    return found


def use_of(op: str, index: int, dtype: torch.dtype) -> Use:
    """A configuration as a graph's use of the op."""
    return use_with(op, dtype, *CONFIGURATIONS[op][index])


def use_with(op: str, dtype: torch.dtype, fixed: dict[str, int], plain: dict[str, Any], absent: tuple[str, ...]) -> Use:
    """The use with these sizes, plain arguments and absent inputs."""
    names = [name for name in declaration(op).inputs if name not in absent]
    letters = dict.fromkeys(letter for name in names for letter in name.rsplit("_", 1)[1] if not letter.isdigit())
    sizes = tuple((letter, None if letter in UNKNOWN else fixed[letter] if letter in fixed else plain[letter]) for letter in letters)
    return Use(op, tuple(plain.items()), tuple((name, _dtype(op, name, dtype)) for name in names), sizes)


def _dtype(op: str, name: str, dtype: torch.dtype) -> torch.dtype:
    stem = name.rsplit("_", 1)[0]
    if stem in INTEGERS:
        return I64
    return F32 if stem in FLOATS else dtype


def tensors_of(use: Use, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of a call."""
    every = {letter: sizes.get(letter, 0) if size is None else size for letter, size in use.sizes}
    return {name: torch.empty(shape_of(name, every), dtype=dtype, device="meta") for name, dtype in use.dtypes}


def eager_call(use: Use, given: dict[str, torch.Tensor], in_place: bool) -> list[torch.Tensor]:
    """Make the op's CUDA form launch, whose launcher notes it; its outputs in order."""
    plain, get = dict(use.plain), given.get
    match use.op:
        case "residual_rms_norm":
            from wm_kernels.residual_rms_norm.triton_op import residual_rms_norm_triton as call

            return list(call(given["x_MD"], given["residual_MD"], get("scale_D"), given["weight_D"], plain["eps"]))
        case "gated_rms_norm":
            from wm_kernels.gated_rms_norm.triton_op import gated_rms_norm_triton

            return [gated_rms_norm_triton(*given.values(), plain["eps"])]
        case "rope":
            from wm_kernels.rope.triton_op import rope_triton

            return [rope_triton(*given.values())]
        case "rope_angles":
            from wm_kernels.rope_angles.triton_op import rope_angles_triton

            numbers = (plain[name] for name in ("scaling", "factor", "original", "low", "high"))
            return list(rope_angles_triton(given["position_BT"], plain["pairs"], plain["theta"], get("length_B"), *numbers))
        case "causal_conv1d":
            from wm_kernels.causal_conv1d.triton_op import causal_conv1d_triton

            after = given["state_BYC"] if in_place else None
            names = ("x_BTC", "weight_CL", "bias_C", "state_BYC", "valid_B")
            return list(causal_conv1d_triton(*map(get, names), plain["activation"], after))
        case "router_topk":
            from wm_kernels.router_topk.triton_op import router_topk_triton

            return list(router_topk_triton(given["logits_ME"], plain["k"], plain["normalize"]))
        case "product_key_topk":
            from wm_kernels.product_key_topk.triton_op import product_key_topk_triton

            return list(product_key_topk_triton(*given.values(), plain["k"]))
        case "expert_mix":
            from wm_kernels.expert_mix.triton_op import expert_mix_triton

            return [expert_mix_triton(*given.values(), plain["activation"], plain["weight_inside"])]
        case "moe_mix":
            from wm_kernels.moe_mix.triton_op import moe_mix_picks, moe_mix_tiles

            call = moe_mix_picks if given["expert_Mk"].numel() <= given["in_EFD"].shape[0] else moe_mix_tiles
            return [call(*map(get, declaration("moe_mix").inputs), plain["activation"], plain["gated"])]
        case "linear":
            from wm_kernels.linear.triton_op import linear_triton

            A, B, C, H, gated = plain.values()
            return list(linear_triton(*map(get, declaration("linear").inputs), (A, B, C, H), gated))
        case "selective_scan":
            from wm_kernels.selective_scan.triton_op import selective_scan_triton

            return list(selective_scan_triton(*map(get, declaration(use.op).inputs), given["state_BCN"] if in_place else None))
        case "ssd_scan" | "ssd_scan_rope":
            from wm_kernels.ssd_scan.triton_op import ssd_scan_triton

            names = ("x_BTHP", "dt_BTH", "A_H", "B_BTGN", "C_BTGN", "state_BHNP", "valid_B", "cos_BTF", "sin_BTF")
            return list(ssd_scan_triton(*map(get, names), in_place))
        case "attention":
            from wm_kernels.attention.triton_op import attend_triton

            caches = given["cache_k_BKSP"], given["cache_v_BKSP"]
            return [attend_triton(given["q_BTHP"], *caches, given["position_B"], new=(given["k_BTKP"], given["v_BTKP"])), *caches]
        case "attention_rope":
            from wm_kernels.attention_rope.triton_op import attend_packed_triton

            caches = given["cache_k_BKSP"], given["cache_v_BKSP"]
            angles = given["cos_BTF"], given["sin_BTF"]
            return [attend_packed_triton(given["qkv_BTC"], *angles, *caches, given["position_B"], plain["n_head"]), *caches]
        case "scored_attention":
            from wm_kernels.attention.triton_op import attend_triton

            caches = given["cache_k_BKSP"], given["cache_v_BKSP"]
            score = given["cache_score_BAS"]
            new = (given["k_BTKP"], given["v_BTKP"])
            return [attend_triton(given["q_BTHP"], *caches, given["position_B"], score, plain["scoring"], new), *caches, score]
        case "keep_window_attention":
            from wm_kernels.keep_window_attention.triton_op import keep_window_attention_triton

            slots = tuple(value for name, value in given.items() if name.startswith("slot_"))
            tokens = [given[name] for name in ("q_BTHP", "k_BTKP", "v_BTKP", "score_BTK")]
            out, after = keep_window_attention_triton(*tokens, slots, given["position_B"], get("valid_B"), plain["window"], True)
            assert after is not None
            return [out, *after]
    raise AssertionError(f"no eager call of {use.op}")
