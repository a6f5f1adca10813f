"""One call of each op at test sizes: arrays, attributes, the reference's answer, and a model of one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from wm_graph.quiet import quiet_libraries
from wm_kernels import onnx_functions

MODULES = onnx_functions._MODULES
TYPES = {"tensor(float)": TensorProto.FLOAT, "tensor(int64)": TensorProto.INT64}


@dataclass
class Case:
    """One call of one op: torch arguments in the op's order, and the node's attributes."""

    op: str
    arguments: dict[str, Any]
    attributes: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # torch arguments that follow the tensors
    half: bool = False

    @property
    def module(self) -> Any:
        return MODULES[f"wm::{self.op}"]

    def reference(self) -> list[np.ndarray]:
        """The reference in float64."""
        wide = {
            k: None if v is None else torch.from_numpy(v.astype(np.float64) if v.dtype.kind == "f" else v)
            for k, v in self.feeds(True).items()
        }
        out = getattr(torch.ops.wm, self.op).default(**wide, **self.extra)
        return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

    def feeds(self, all_of_them: bool = False) -> dict[str, Any]:
        half = {name for name, kind in self.module.INPUTS if kind == "T"} if self.half else set()
        cast = {k: v.astype(np.float16) if v is not None and k in half else v for k, v in self.arguments.items()}
        return cast if all_of_them else {k: v for k, v in cast.items() if v is not None}

    def in_bfloat16(self) -> onnx.ModelProto:
        """The portable model in bfloat16, whose inputs and outputs are float32: what it computes with is cast."""
        model = self.model("portable", TensorProto.BFLOAT16)
        graph = model.graph
        (node,) = graph.node
        for values, names, kinds, first in (
            (graph.input, node.input, TensorProto.BFLOAT16, True),
            (graph.output, node.output, TensorProto.FLOAT, False),
        ):
            for value in values:
                if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT
                    inner = f"{value.name}/bfloat16"
                    names[list(names).index(value.name)] = inner
                    ends = (value.name, inner) if first else (inner, value.name)
                    graph.node.insert(0 if first else len(graph.node), helper.make_node("Cast", [ends[0]], [ends[1]], to=kinds))
        return model

    def model(self, flavour: str, dtype: int | None = None) -> onnx.ModelProto:
        """A model of one node, every dimension that varies at run time symbolic."""
        t = dtype or (TensorProto.FLOAT16 if self.half else TensorProto.FLOAT)
        present = [n if self.arguments[n] is not None else "" for n, _ in self.module.INPUTS if n in self.arguments]
        outputs = [n for n, _ in self.module.OUTPUTS]
        node = helper.make_node(self.module.OP_TYPE, present, outputs, name="node", domain="wm", **self.attributes)
        dims = {
            n: [c if c in "BTSWM" else v.shape[i] for i, c in enumerate(letters(n))] for n, v in self.arguments.items() if v is not None
        }
        inputs = [helper.make_tensor_value_info(n, TYPES.get(kind, t), dims[n]) for n, kind in self.module.INPUTS if n in dims]
        infos = [
            helper.make_tensor_value_info(n, TYPES.get(kind, t), [f"{n}_{i}" for i, _ in enumerate(letters(n))])
            for n, kind in self.module.OUTPUTS
        ]
        graph = helper.make_graph([node], "g", inputs, infos)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("wm", 1), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets[: 3 if flavour == "ort" else 2], ir_version=10)
        onnx_functions.add_bodies(model, flavour)
        return model


def joined(cases: Sequence[Case], flavour: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One model of a node for each case, and its feeds; names of case i begin with "i/"."""
    model, *others = (onnx.compose.add_prefix(case.model(flavour), f"{i}/", rename_functions=False) for i, case in enumerate(cases))
    for other in others:
        model.graph.node.extend(other.graph.node)
        model.graph.input.extend(other.graph.input)
        model.graph.output.extend(other.graph.output)
    onnx_functions.add_bodies(model, flavour)
    return model, {f"{i}/{name}": value for i, case in enumerate(cases) for name, value in case.feeds().items()}


def session_of_program(program: torch.export.ExportedProgram, flavour: str) -> ort.InferenceSession:
    """A session on the ONNX file of an exported program."""
    table = {getattr(torch.ops.wm, name.removeprefix("wm::")).default: function for name, function in onnx_functions.TRANSLATIONS.items()}
    with quiet_libraries():
        exported = torch.onnx.export(
            program, (), dynamo=True, opset_version=onnx_functions.OPSET, custom_translation_table=table, verbose=False, optimize=False
        )
    assert exported is not None
    model = exported.model_proto
    onnx_functions.add_bodies(model, flavour)
    if flavour == "ort":
        model.opset_import.add(domain="com.microsoft", version=1)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def letters(name: str) -> list[str]:
    """x_BTHP -> B, T, H, P; the 2 of query_BTR2d too."""
    return list(name.rsplit("_", 1)[1])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def angles(position_BT: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    angle = position_BT[..., None] * 10000.0 ** (-np.arange(pairs) / pairs)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rope_angles_case(B: int, T: int, seed: int = 0, start: int = 2**24 - 300, pairs: int = 32, **scaling: Any) -> Case:
    position_BT = np.arange(T)[None] + np.linspace(0, start, B, dtype=np.int64)[:, None]
    length = {"length_B": position_BT[:, -1] + 1} if scaling.get("scaling") == "dynamic" else {}
    scaling = {"factor": 1.0, "original": 1, "low": 1.0, "high": 4.0} | scaling if scaling else {}
    written = {name: repr(value) if isinstance(value, float) else value for name, value in scaling.items()}
    base = {"pairs": pairs, "theta": 1e4}
    return Case("rope_angles", {"position_BT": position_BT} | length, base | written, base | {"double": True} | scaling)


def rope_case(B: int, T: int, seed: int = 0, half: bool = False, pairs: int = 8, H: int = 3) -> Case:
    rng = np.random.default_rng(seed)
    x = normal(rng, B, T, H, 20)
    cos, sin = angles(rng.integers(0, 1000, (B, T)), pairs)
    return Case("rope", {"x_BTHP": x, "cos_BTF": cos, "sin_BTF": sin}, {"head_dim": 20, "num_heads": H, "pairs": pairs}, half=half)


def residual_rms_norm_case(B: int, T: int, seed: int = 0, half: bool = False, scale: bool = True) -> Case:
    rng = np.random.default_rng(seed)
    x, residual, weight = normal(rng, B * T, 24), normal(rng, B * T, 24), normal(rng, 24)
    arguments = {"x_MD": x, "residual_MD": residual, "scale_D": normal(rng, 24) if scale else None, "weight_D": weight}
    return Case("residual_rms_norm", arguments, {"eps": 1e-5}, {"eps": 1e-5}, half=half)


def ragged(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    return np.array([T, *rng.integers(0, T + 1, B - 1)])


def ssd_case(B: int, T: int, seed: int = 0, half: bool = False, G: int = 2, rope: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    H, P, N = 4, 8, 12
    arguments = {
        "x_BTHP": normal(rng, B, T, H, P),
        "dt_BTH": np.log1p(np.exp(2 * normal(rng, B, T, H))),
        "A_H": -np.linspace(0.1, 8, H, dtype=np.float32),
        "B_BTGN": normal(rng, B, T, G, N),
        "C_BTGN": normal(rng, B, T, G, N),
    }
    attributes = {"head_dim": P, "num_groups": G, "num_heads": H, "state_dim": N}
    if rope:
        arguments["cos_BTF"], arguments["sin_BTF"] = angles(rng.integers(0, 1000, (B, T)), 5)
        attributes["pairs"] = 5
    arguments |= {"state_BHNP": normal(rng, B, H, N, P), "valid_B": ragged(rng, B, T)}
    return Case("ssd_scan_rope" if rope else "ssd_scan", arguments, attributes, half=half)


def attention_case(B: int, T: int, seed: int = 0, half: bool = False, past: int = 9, H: int = 6, K: int = 2, P: int = 16) -> Case:
    rng = np.random.default_rng(seed)
    S = past + T + 3
    arguments = {
        "q_BTHP": normal(rng, B, T, H, P),
        "k_BTKP": normal(rng, B, T, K, P),
        "v_BTKP": normal(rng, B, T, K, P),
        "cache_k_BKSP": normal(rng, B, K, S, P),
        "cache_v_BKSP": normal(rng, B, K, S, P),
        "position_B": np.array([past, *rng.integers(0, past + 1, B - 1)]),
        "valid_B": ragged(rng, B, T),
    }
    return Case("attention", arguments, {"head_dim": P, "kv_num_heads": K, "num_heads": H}, half=half)


def attention_rope_case(B: int, T: int, seed: int = 0, half: bool = False, pairs: int = 8, **sizes: int) -> Case:
    plain = attention_case(B, T, seed, **sizes)
    heads = [plain.arguments.pop(name) for name in ("q_BTHP", "k_BTKP", "v_BTKP")]
    position_BT = plain.arguments["position_B"][:, None] + np.arange(T)
    packed = {
        "qkv_BTC": np.concatenate(heads, 2).reshape(B, T, -1),
        **dict(zip(("cos_BTF", "sin_BTF"), angles(position_BT, pairs), strict=True)),
    }
    counts = {"n_head": heads[0].shape[2], "n_kv_head": heads[1].shape[2], "head_dim": heads[0].shape[3]}
    return Case("attention_rope", packed | plain.arguments, plain.attributes | {"pairs": pairs}, counts, half)


def keep_window_case(
    B: int,
    T: int,
    seed: int = 0,
    half: bool = False,
    W: int = 7,
    past: int | None = None,
    H: int = 4,
    K: int = 2,
    ties: bool = True,
    P: int = 8,
) -> Case:
    """Slots as an earlier run leaves them: some empty, in any order, of scores with many ties."""
    rng = np.random.default_rng(seed)
    score_BTK, slot_score = normal(rng, B, T, K), normal(rng, B, K, W)
    if ties:
        score_BTK, slot_score = np.round(score_BTK), np.round(slot_score)
    position_B = rng.integers(W, 2 * W + 1, B) if past is None else np.full(B, past)
    slot_position = np.stack([[rng.permutation(max(p, W))[:W] for _ in range(K)] for p in position_B])
    empty = (rng.random((B, K, W)) < 0.3) if past is None else (slot_position >= past)
    if B > 1:
        empty[-1] = True
    arguments = {
        "q_BTHP": normal(rng, B, T, H, P),
        "k_BTKP": normal(rng, B, T, K, P),
        "v_BTKP": normal(rng, B, T, K, P),
        "score_BTK": score_BTK,
        "slot_k_BKWP": normal(rng, B, K, W, P),
        "slot_v_BKWP": normal(rng, B, K, W, P),
        "slot_score_BKW": np.where(empty, -np.inf, slot_score).astype(np.float32),
        "slot_position_BKW": np.where(empty, -1, slot_position),
        "position_B": position_B,
        "valid_B": ragged(rng, B, T),
    }
    return Case(
        "keep_window_attention", arguments, {"head_dim": P, "kv_num_heads": K, "num_heads": H, "window": W}, {"window": W}, half=half
    )


def product_key_case(B: int, T: int, seed: int = 0, half: bool = False, k: int = 4, ties: bool = True) -> Case:
    rng = np.random.default_rng(seed)
    R, J, d = 2, 9, 6
    query, keys = normal(rng, B, T, R, 2, d), normal(rng, R, J, 2, d)
    if ties:
        query, keys = np.round(query), np.round(keys)
    return Case("product_key_topk", {"query_BTR2d": query, "keys_RJ2d": keys}, {"k": k, "num_heads": R, "num_keys": J}, {"k": k}, half=half)


def expert_mix_case(B: int, T: int, seed: int = 0, half: bool = False, activation: str = "silu", inside: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    R, k, E, D = 2, 3, 25, 10
    arguments = {
        "x_BTD": normal(rng, B, T, D),
        "expert_BTRk": rng.integers(0, E, (B, T, R, k)),
        "weight_BTRk": rng.random((B, T, R, k)).astype(np.float32),
        "down_ED": normal(rng, E, D),
        "up_ED": normal(rng, E, D),
    }
    attributes = {"activation": activation, "weight_inside": int(inside), "num_picks": R * k, "width": D}
    return Case("expert_mix", arguments, attributes, {"activation": activation, "weight_inside": inside}, half=half)


def conv_case(
    B: int, T: int, seed: int = 0, half: bool = False, C: int = 10, L: int = 4, bias: bool = True, activation: str = "silu"
) -> Case:
    rng = np.random.default_rng(seed)
    arguments = {
        "x_BTC": normal(rng, B, T, C),
        "weight_CL": normal(rng, C, L),
        "bias_C": normal(rng, C) if bias else None,
        "state_BYC": normal(rng, B, L - 1, C),
        "valid_B": ragged(rng, B, T),
    }
    return Case("causal_conv1d", arguments, {"activation": activation, "channels": C, "taps": L}, {"activation": activation}, half=half)


def gated_rms_norm_case(B: int, T: int, seed: int = 0, half: bool = False, eps: float = 1e-5) -> Case:
    rng = np.random.default_rng(seed)
    arguments = {"y_MC": normal(rng, B * T, 24), "z_MC": normal(rng, B * T, 24), "weight_C": normal(rng, 24)}
    return Case("gated_rms_norm", arguments, {"eps": eps}, {"eps": eps}, half=half)


def selective_case(B: int, T: int, seed: int = 0, half: bool = False, C: int = 10, N: int = 6) -> Case:
    rng = np.random.default_rng(seed)
    arguments = {
        "x_BTC": normal(rng, B, T, C),
        "dt_BTC": np.log1p(np.exp(2 * normal(rng, B, T, C))),
        "A_CN": -np.linspace(0.1, 8, C * N, dtype=np.float32).reshape(C, N),
        "B_BTN": normal(rng, B, T, N),
        "C_BTN": normal(rng, B, T, N),
        "state_BCN": normal(rng, B, C, N),
        "valid_B": ragged(rng, B, T),
    }
    return Case("selective_scan", arguments, {}, half=half)


def scored_case(
    B: int,
    T: int,
    seed: int = 0,
    half: bool = False,
    past: int = 9,
    H: int = 6,
    K: int = 2,
    A: int = 2,
    scoring: str = "additive",
    ratio: float = 0.0,
    ties: bool = True,
) -> Case:
    plain = attention_case(B, T, seed, half, past, H, K)
    rng = np.random.default_rng(seed + 1)
    k = plain.arguments["cache_k_BKSP"]
    score, cache = normal(rng, B, T, A), normal(rng, B, A, k.shape[2])
    if ties:
        score, cache = np.round(score), np.round(cache)
    arguments: dict[str, Any] = {}
    for name, value in plain.arguments.items():
        if name == "cache_k_BKSP":
            arguments["score_BTA"] = score
        if name == "position_B":
            arguments["cache_score_BAS"] = cache
        arguments[name] = value
    attributes = {**plain.attributes, "scoring": scoring, "ratio": repr(ratio), "score_num_heads": A}
    return Case("scored_attention", arguments, attributes, {"scoring": scoring, "ratio": ratio}, half=half)


def router_case(B: int, T: int, seed: int = 0, half: bool = False, k: int = 3, normalize: bool = False, ties: bool = True) -> Case:
    logits = 2 * normal(np.random.default_rng(seed), B * T, 9)
    arguments = {"logits_ME": np.round(logits) if ties else logits}
    return Case("router_topk", arguments, {"k": k, "normalize": int(normalize)}, {"k": k, "normalize": normalize}, half=half)


def moe_case(
    B: int, T: int, seed: int = 0, half: bool = False, gated: bool = True, bias: bool = False, activation: str = "silu", k: int = 2
) -> Case:
    rng = np.random.default_rng(seed)
    M, E, D, I = B * T, 6, 10, 7
    F = 2 * I if gated else I
    # The last expert is never chosen; the same one may be chosen twice.
    arguments = {
        "x_MD": normal(rng, M, D),
        "expert_Mk": rng.integers(0, E - 1, (M, k)),
        "weight_Mk": rng.random((M, k)).astype(np.float32),
        "in_EFD": normal(rng, E, F, D),
        "in_bias_EF": normal(rng, E, F) if bias else None,
        "out_EDI": normal(rng, E, D, I),
        "out_bias_ED": normal(rng, E, D) if bias else None,
    }
    # A size that lets the onnxruntime body gather the matrices of up to 8 picks.
    attributes = {"activation": activation, "expert_size": 2**16, "gated": int(gated), "num_picks": k}
    return Case("moe_mix", arguments, attributes, {"activation": activation, "gated": gated}, half=half)


def linear_case(
    B: int,
    T: int,
    seed: int = 0,
    half: bool = False,
    parts: tuple[int, int, int, int] = (6, 5, 4, 0),
    gated: bool = False,
    bias: bool = False,
    step_bias: bool = False,
) -> Case:
    rng = np.random.default_rng(seed)
    K, outputs = 40, sum(parts) * (2 if gated else 1)
    arguments = {
        "x_MK": normal(rng, B * T, K),
        "weight_NK": normal(rng, outputs, K) / np.float32(K**0.5),
        "bias_N": normal(rng, outputs) if bias else None,
        "step_bias_H": normal(rng, parts[3]) if step_bias else None,
    }
    plain = dict(zip("ABCH", parts, strict=True)) | {"gated": gated}
    return Case("linear", arguments, plain | {"gated": int(gated)}, plain, half)


CASES: dict[str, Callable[..., Case]] = {
    "rope_angles": rope_angles_case,
    "rope_angles_linear": lambda B, T, **more: rope_angles_case(B, T, scaling="linear", factor=3.7, **more),
    "rope_angles_llama3": lambda B, T, **more: rope_angles_case(
        B, T, scaling="llama3", factor=8.1, original=8192, low=1.1, high=3.9, **more
    ),
    "rope_angles_dynamic": lambda B, T, **more: rope_angles_case(B, T, scaling="dynamic", factor=4.3, original=60, **more),
    "rope_angles_dynamic_one_pair": lambda B, T, **more: rope_angles_case(
        B, T, pairs=1, scaling="dynamic", factor=4.3, original=60, **more
    ),
    "rope": rope_case,
    "rope_full_width": lambda B, T, **more: rope_case(B, T, pairs=10, **more),
    "residual_rms_norm": residual_rms_norm_case,
    "residual_rms_norm_unscaled": lambda B, T, **more: residual_rms_norm_case(B, T, scale=False, **more),
    "ssd_scan": ssd_case,
    "ssd_scan_one_group": lambda B, T, **more: ssd_case(B, T, G=1, **more),
    "ssd_scan_rope": lambda B, T, **more: ssd_case(B, T, G=4, rope=True, **more),
    "attention": attention_case,
    "attention_from_zero": lambda B, T, **more: attention_case(B, T, past=0, **more),
    "attention_mha": lambda B, T, **more: attention_case(B, T, H=2, K=2, **more),
    "attention_rope": attention_rope_case,
    "attention_rope_part": lambda B, T, **more: attention_rope_case(B, T, pairs=5, H=2, **more),
    "attention_rope_narrow": lambda B, T, **more: attention_rope_case(B, T, pairs=4, P=8, **more),
    "attention_rope_from_zero": lambda B, T, **more: attention_rope_case(B, T, past=0, **more),
    "keep_window": keep_window_case,
    "keep_window_nothing_leaves": lambda B, T, **more: keep_window_case(B, T, W=300, past=20, **more),
    "keep_window_from_zero": lambda B, T, **more: keep_window_case(B, T, W=100, past=0, **more),
    "keep_window_one_slot": lambda B, T, **more: keep_window_case(B, T, W=1, **more),
    "keep_window_no_ties": lambda B, T, **more: keep_window_case(B, T, W=100, ties=False, **more),
    "product_key_topk": product_key_case,
    "product_key_topk_all": lambda B, T, **more: product_key_case(B, T, k=9, ties=False, **more),
    "expert_mix": expert_mix_case,
    "expert_mix_inside": lambda B, T, **more: expert_mix_case(B, T, activation="gelu", inside=True, **more),
    "scored_attention": scored_case,
    "scored_attention_per_head": lambda B, T, **more: scored_case(B, T, past=0, A=6, ties=False, **more),
    "scored_attention_binary": lambda B, T, **more: scored_case(B, T, A=6, scoring="binary", **more),
    "scored_attention_ratio": lambda B, T, **more: scored_case(B, T, scoring="ratio", ratio=0.7, **more),
    "scored_attention_ratio_one_head": lambda B, T, **more: scored_case(B, T, A=1, past=40, scoring="ratio", ratio=0.29, **more),
    "router_topk": router_case,
    "router_topk_normalized": lambda B, T, **more: router_case(B, T, k=9, normalize=True, ties=False, **more),
    "moe_mix": moe_case,
    "moe_mix_biased": lambda B, T, **more: moe_case(B, T, gated=False, bias=True, activation="gelu", k=3, **more),
    "causal_conv1d": conv_case,
    "causal_conv1d_in_blocks": lambda B, T, **more: conv_case(B, T, C=48, **more),
    "causal_conv1d_in_blocks_plain": lambda B, T, **more: conv_case(B, T, C=16, L=3, bias=False, activation="none", **more),
    "causal_conv1d_plain": lambda B, T, **more: conv_case(B, T, L=2, bias=False, activation="none", **more),
    "gated_rms_norm": gated_rms_norm_case,
    "linear": linear_case,
    "linear_with_steps": lambda B, T, **more: linear_case(B, T, parts=(6, 5, 4, 3), step_bias=True, **more),
    "linear_steps_without_a_bias_of_theirs": lambda B, T, **more: linear_case(B, T, parts=(6, 0, 4, 3), bias=True, **more),
    "linear_steps_alone": lambda B, T, **more: linear_case(B, T, parts=(0, 0, 0, 9), step_bias=True, **more),
    "linear_whole": lambda B, T, **more: linear_case(B, T, parts=(11, 0, 0, 0), bias=True, **more),
    "linear_gated": lambda B, T, **more: linear_case(B, T, parts=(7, 0, 0, 0), gated=True, **more),
    "linear_gated_biased": lambda B, T, **more: linear_case(B, T, parts=(7, 0, 0, 0), gated=True, bias=True, **more),
    "selective_scan": selective_case,
    "selective_scan_one_state": lambda B, T, **more: selective_case(B, T, C=7, N=1, **more),
}
