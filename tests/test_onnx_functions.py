"""Each ONNX body against the PyTorch reference, in onnxruntime and in the reference evaluator, and the rule of aliased state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

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
        out = getattr(torch.ops.wm, self.op).default(*wide.values(), *self.extra.values())
        return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]

    def feeds(self, all_of_them: bool = False) -> dict[str, Any]:
        half = {name for name, kind in self.module.INPUTS if kind == "T"} if self.half else set()
        cast = {k: v.astype(np.float16) if v is not None and k in half else v for k, v in self.arguments.items()}
        return cast if all_of_them else {k: v for k, v in cast.items() if v is not None}

    def model(self, flavour: str) -> onnx.ModelProto:
        """A model of one node, every dimension that varies at run time symbolic."""
        t = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        present = [n if self.arguments[n] is not None else "" for n, _ in self.module.INPUTS]
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
        model.functions.extend(onnx_functions.bodies(model, flavour))
        return model


def letters(name: str) -> list[str]:
    """x_BTHP -> B, T, H, P; the 2 of query_BTR2d too."""
    return list(name.rsplit("_", 1)[1])


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def angles(position_BT: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    angle = position_BT[..., None] * 10000.0 ** (-np.arange(pairs) / pairs)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rope_angles_case(B: int, T: int, seed: int = 0, start: int = 2**24 - 300, pairs: int = 32) -> Case:
    position_BT = np.arange(T)[None] + np.linspace(0, start, B, dtype=np.int64)[:, None]
    return Case("rope_angles", {"position_BT": position_BT}, {"pairs": pairs, "theta": 1e4}, {"pairs": pairs, "theta": 1e4, "double": True})


def rope_case(B: int, T: int, seed: int = 0, half: bool = False, pairs: int = 8) -> Case:
    rng = np.random.default_rng(seed)
    x = normal(rng, B, T, 3, 20)
    cos, sin = angles(rng.integers(0, 1000, (B, T)), pairs)
    return Case("rope", {"x_BTHP": x, "cos_BTF": cos, "sin_BTF": sin}, {"head_dim": 20, "num_heads": 3, "pairs": pairs}, half=half)


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
    arguments |= {"state_BHPN": normal(rng, B, H, P, N), "valid_B": ragged(rng, B, T)}
    return Case("ssd_scan_rope" if rope else "ssd_scan", arguments, attributes, half=half)


def attention_case(B: int, T: int, seed: int = 0, half: bool = False, past: int = 9, H: int = 6, K: int = 2) -> Case:
    rng = np.random.default_rng(seed)
    P, S = 16, past + T + 3
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


def judge(case: Case, got: list[np.ndarray], tolerance: float) -> None:
    """Compare what has a meaning: valid tokens, live cells, slots sorted by position."""
    want = case.reference()
    names = [n for n, _ in case.module.OUTPUTS]
    valid_B, position_B = case.arguments.get("valid_B"), case.arguments.get("position_B")
    if case.op == "keep_window_attention":
        got, want = sorted_slots(got), sorted_slots(want)
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape, name
        assert np.isfinite(g).all() or "score" in name, name
        if valid_B is not None and letters(name)[:2] == ["B", "T"]:
            live = np.arange(g.shape[1])[None] < valid_B[:, None]
            g, w = g[live], w[live]
        elif case.op == "attention":
            live = np.arange(g.shape[2])[None] < (position_B + valid_B)[:, None]
            g, w = (np.where(live[:, None, :, None], v, 0) for v in (g, w))
        if g.dtype.kind == "i":
            np.testing.assert_array_equal(g, w, err_msg=name)
        else:
            finite = np.isfinite(w)
            np.testing.assert_array_equal(g[~finite], w[~finite], err_msg=name)
            scale = max(1.0, float(np.abs(w[finite]).max(initial=0)))
            np.testing.assert_allclose(g[finite] / scale, w[finite] / scale, atol=tolerance, rtol=0, err_msg=name)


def sorted_slots(outputs: list[np.ndarray]) -> list[np.ndarray]:
    out, k, v, score, position = outputs
    order = np.argsort(position, axis=2)
    k, v = (np.take_along_axis(np.where((position >= 0)[..., None], x, 0), order[..., None], 2) for x in (k, v))
    return [out, k, v, np.take_along_axis(score, order, 2), np.take_along_axis(position, order, 2)]


CASES = {
    "rope_angles": rope_angles_case,
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
    "keep_window": keep_window_case,
    "keep_window_nothing_leaves": lambda B, T, **more: keep_window_case(B, T, W=300, past=20, **more),
    "keep_window_from_zero": lambda B, T, **more: keep_window_case(B, T, W=100, past=0, **more),
    "keep_window_one_slot": lambda B, T, **more: keep_window_case(B, T, W=1, **more),
    "keep_window_no_ties": lambda B, T, **more: keep_window_case(B, T, W=100, ties=False, **more),
    "product_key_topk": product_key_case,
    "product_key_topk_all": lambda B, T, **more: product_key_case(B, T, k=9, ties=False, **more),
    "expert_mix": expert_mix_case,
    "expert_mix_inside": lambda B, T, **more: expert_mix_case(B, T, activation="gelu", inside=True, **more),
}
FLAVOURS = ["portable", "ort"]
LENGTHS = [(1, 1), (3, 1), (1, 2), (3, 2), (1, 63), (3, 64), (3, 65), (1, 257), (3, 257)]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CASES)
def test_body_matches_reference(name: str, flavour: str) -> None:
    run = session(CASES[name](1, 1).model(flavour))
    for seed, (B, T) in enumerate(LENGTHS):
        case = CASES[name](B, T, seed=seed)
        judge(case, run.run(None, case.feeds()), 4e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", [n for n in CASES if n != "rope_angles"])
def test_half_body_matches_reference(name: str, flavour: str) -> None:
    run = session(CASES[name](1, 1, half=True).model(flavour))
    for seed, (B, T) in enumerate([(1, 1), (3, 1), (3, 65)]):
        case = CASES[name](B, T, seed=seed, half=True)
        judge(case, run.run(None, case.feeds()), 3e-3)


@pytest.mark.parametrize("name", CASES)
def test_portable_body_runs_in_the_reference_evaluator(name: str) -> None:
    run = ReferenceEvaluator(CASES[name](1, 1).model("portable"))
    for seed, (B, T) in enumerate([(1, 1), (2, 5), (2, 70)]):
        case = CASES[name](B, T, seed=seed)
        judge(case, run.run(None, case.feeds()), 4e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CASES)
def test_model_is_valid_and_reproducible(name: str, flavour: str, half: bool) -> None:
    case = CASES[name](1, 1) if name == "rope_angles" else CASES[name](1, 1, half=half)
    model = case.model(flavour)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert model.SerializeToString(deterministic=True) == case.model(flavour).SerializeToString(deterministic=True)
    domains = {node.domain for node in walk(inline_local_functions(model).graph)}
    assert domains <= ({""} if flavour == "portable" else {"", "com.microsoft"})


def walk(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return list(graph.node) + [node for g in inner for node in walk(g)]


STATES = {
    "state_BHPN": "next_BHPN",
    "cache_k_BKSP": "next_k_BKSP",
    "cache_v_BKSP": "next_v_BKSP",
    "slot_k_BKWP": "next_k_BKWP",
    "slot_v_BKWP": "next_v_BKWP",
    "slot_score_BKW": "next_score_BKW",
    "slot_position_BKW": "next_position_BKW",
}
# These write only what changes, or each element after reading it, so they may read the state while they make its successor.
SAFE_IN_PLACE = {"ScatterElements", "GroupQueryAttention", "Add", "Mul", "Where", "If"}


def hazards(graph: onnx.GraphProto, state: str, output: str) -> list[str]:
    """Readers of `state` that may run after the node that makes `output` from it; a branch is judged as a graph of its own."""
    maker = {name: node for node in graph.node for name in node.output}
    inner = lambda node: [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]  # noqa: E731
    reads = lambda node: {*node.input, *(n for g in inner(node) for x in walk(g) for n in x.input)}  # noqa: E731
    before: set[str] = set()
    todo = [output]
    while todo:
        node = maker.get(todo.pop())
        if node is not None and node.name not in before:
            before.add(node.name)
            todo += reads(node)
    last = maker[output]
    found = [n.name for n in graph.node if state in reads(n) and n.op_type != "Shape" and n.name not in before]
    if state in reads(last) and last.op_type not in SAFE_IN_PLACE:
        found.append(last.name)
    index = list(last.output).index(output)
    for branch in inner(last):
        found += hazards(branch, state, branch.output[index].name)
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", [n for n in CASES if set(CASES[n](1, 1).arguments) & set(STATES)])
def test_every_reader_of_a_state_precedes_its_writer(name: str, flavour: str) -> None:
    case = CASES[name](1, 1)
    graph = inline_local_functions(case.model(flavour)).graph
    for state, after in STATES.items():
        if state in case.arguments:
            assert hazards(graph, state, after) == []


def test_a_late_reader_is_found() -> None:
    late = helper.make_node("Neg", ["s"], ["late"], name="late")
    write = helper.make_node("ScatterElements", ["s", "i", "u"], ["next"], name="write")
    assert hazards(helper.make_graph([write, late], "g", [], []), "s", "next") == ["late"]


def bound_steps(run: ort.InferenceSession, cases: list[Case], alias: bool) -> list[list[np.ndarray]]:
    """Several calls, the state of each fed to the next: through one buffer for input and output, or through fresh ones."""
    own = ort.OrtValue.ortvalue_from_numpy  # shares the array's memory and keeps it alive
    state = {s: own(cases[0].feeds()[s].copy()) for s in STATES if s in cases[0].arguments}
    results = []
    for case in cases:
        binding = run.io_binding()
        inputs = {name: state.get(name) or own(value) for name, value in case.feeds().items()}
        after = state if alias else {s: own(np.zeros_like(value.numpy())) for s, value in state.items()}
        bound = {STATES[s]: value for s, value in after.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, _ in case.module.OUTPUTS:
            if name in bound:
                binding.bind_ortvalue_output(name, bound[name])
            else:
                binding.bind_output(name)
        run.run_with_iobinding(binding)
        results.append([value.numpy().copy() for value in binding.get_outputs()])
        state = after
    return results


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", [n for n in CASES if set(CASES[n](1, 1).arguments) & set(STATES)])
@pytest.mark.parametrize("half", [False, True])
def test_one_buffer_for_state_in_and_out(name: str, flavour: str, half: bool) -> None:
    run = session(CASES[name](1, 1).model(flavour)) if not half else session(CASES[name](1, 1, half=True).model(flavour))
    for B in (1, 3):
        # The capacity of the first call's cache is what the later, shorter calls leave unused.
        cases = [CASES[name](B, T, seed=T, half=half) for T in (70, 1, 1, 5, 1)]
        if "attention" in name:
            for case in cases:
                case.arguments["position_B"] = cases[0].arguments["position_B"]
        for case, got, want in zip(cases, bound_steps(run, cases, True), bound_steps(run, cases, False), strict=True):
            if "attention" in name:
                # Cells past the call's end are undefined.
                used = (case.arguments["position_B"] + case.arguments["q_BTHP"].shape[1])[:, None, None, None]
                got[1:], want[1:] = ([np.where(np.arange(x.shape[2])[:, None] < used, x, 0) for x in xs[1:]] for xs in (got, want))
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(g, w)


def test_unset_cells_do_no_harm() -> None:
    run = session(attention_case(1, 1).model("ort"))
    case = attention_case(3, 4)
    want = run.run(None, case.feeds())[0]
    for b, end in enumerate(case.arguments["position_B"]):
        for cache in ("cache_k_BKSP", "cache_v_BKSP"):
            case.arguments[cache][b, :, end:] = np.nan
    np.testing.assert_array_equal(run.run(None, case.feeds())[0], want)


@pytest.mark.parametrize("change", [{"half": True}, {"H": 2}])
def test_two_bodies_of_one_op_type_are_refused(change: dict[str, Any]) -> None:
    model, other = attention_case(1, 1).model("portable"), attention_case(1, 1, **change).model("portable")
    for node in other.graph.node:
        node.name = "other"
        node.input[:] = [f"{n}_other" for n in node.input]
        node.output[:] = [f"{n}_other" for n in node.output]
    for info in other.graph.input:
        info.name += "_other"
    model.graph.node.extend(other.graph.node)
    model.graph.input.extend(other.graph.input)
    del model.functions[:]
    with pytest.raises(ValueError, match="WmAttention nodes of one model need different bodies"):
        onnx_functions.bodies(model, "portable")


def test_angles_of_two_tables_in_one_model() -> None:
    cases = [rope_angles_case(2, 3, pairs=p) for p in (4, 8)]
    nodes = [
        helper.make_node("WmRopeAngles", ["p"], [f"c{i}", f"s{i}"], domain="wm", name=f"n{i}", **c.attributes) for i, c in enumerate(cases)
    ]
    outputs = [helper.make_tensor_value_info(f"{x}{i}", 1, ["B", "T", None]) for i in (0, 1) for x in "cs"]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("p", TensorProto.INT64, ["B", "T"])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("wm", 1)], ir_version=10)
    model.functions.extend(onnx_functions.bodies(model, "portable"))
    onnx.checker.check_model(model, full_check=True)
    feeds = {"p": cases[0].arguments["position_BT"]}
    for run in (session(model), ReferenceEvaluator(model)):
        got = run.run(None, feeds)
        judge(cases[0], got[:2], 4e-6)
        judge(cases[1], got[2:], 4e-6)
