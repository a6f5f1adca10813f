"""Each ONNX body against the PyTorch reference, in onnxruntime and in the reference evaluator, and the rule of aliased state."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_cases import CASES, Case, attention_case, joined, letters, rope_angles_case
from wm_kernels import onnx_functions

FLAVOURS = ["portable", "ort"]
LENGTHS = [(1, 1), (3, 1), (1, 2), (3, 2), (1, 63), (3, 64), (3, 65), (1, 257), (3, 257)]


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
        elif "cache_k_BKSP" in case.arguments:
            g, w = (first_cells(v, position_B + valid_B) for v in (g, w))
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


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CASES)
def test_body_matches_reference(name: str, flavour: str) -> None:
    run = session(CASES[name](1, 1).model(flavour))
    for seed, (B, T) in enumerate(LENGTHS):
        case = CASES[name](B, T, seed=seed)
        judge(case, run.run(None, case.feeds()), 4e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("rope_angles")])
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


class TopK(OpRun):
    """As ONNX Runtime's CUDA provider has it: equal values in any order, and rows filled up with a number that is above -inf."""

    op_domain = ""

    def _run(self, x: np.ndarray, k: np.ndarray, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[np.ndarray, np.ndarray]:
        assert axis in (-1, x.ndim - 1)
        size = x.shape[-1]
        limits = np.finfo(x.dtype) if x.dtype.kind == "f" else np.iinfo(x.dtype)
        width = 2 ** int(np.ceil(np.log2(size)))
        filled = np.concatenate([x, np.full((*x.shape[:-1], width - size), limits.min if largest else limits.max, x.dtype)], -1)
        order = np.argsort(filled, -1)  # later ones of equal values come first, where the largest is
        order = (order[..., ::-1] if largest else order)[..., : int(k[0])]
        return np.take_along_axis(filled, order, -1), order.astype(np.int64)


@pytest.mark.parametrize("name", [name for name in CASES if "keep_window" in name or name.startswith("scored")])
def test_a_provider_that_ranks_equal_values_in_no_order_and_infinities_wrongly_gives_the_same(name: str) -> None:
    run = ReferenceEvaluator(inline_local_functions(CASES[name](1, 1).model("portable")), new_ops=[TopK])
    for seed, (B, T) in enumerate([(2, 5), (2, 70)]):
        case = CASES[name](B, T, seed=seed)
        judge(case, run.run(None, case.feeds()), 4e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CASES)
def test_model_is_valid_and_reproducible(name: str, flavour: str, half: bool) -> None:
    case = CASES[name](1, 1) if name.startswith("rope_angles") else CASES[name](1, 1, half=half)
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
    "state_BHNP": "next_BHNP",
    "state_BYC": "next_BYC",
    "state_BCN": "next_BCN",
    "cache_k_BKSP": "next_k_BKSP",
    "cache_v_BKSP": "next_v_BKSP",
    "cache_score_BAS": "next_score_BAS",
    "slot_k_BKWP": "next_k_BKWP",
    "slot_v_BKWP": "next_v_BKWP",
    "slot_score_BKW": "next_score_BKW",
    "slot_position_BKW": "next_position_BKW",
}
# These write only what changes, or each element after reading it, so they may read the state while they make its successor.
SAFE_IN_PLACE = {"ScatterElements", "GroupQueryAttention", "LinearAttention", "Add", "Mul", "Where", "If"}


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


def first_cells(cache: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """The first cells of each row; zeros after them."""
    used = np.arange(cache.shape[2]) < count_B[:, None, None]
    return np.where(used if cache.ndim == 3 else used[..., None], cache, 0)


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
                used = case.arguments["position_B"] + next(iter(case.arguments.values())).shape[1]
                got[1:], want[1:] = ([first_cells(x, used) for x in xs[1:]] for xs in (got, want))
            for g, w in zip(got, want, strict=True):
                np.testing.assert_array_equal(g, w)


def largest_value(case: Case) -> int:
    """Elements of the largest value that the portable body makes, those inside of a Scan apart."""
    model = inline_local_functions(case.model("portable"))
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return max(np.size(value) for value in ReferenceEvaluator(model).run(names, case.feeds()))


@pytest.mark.parametrize("name", ["ssd_scan", "ssd_scan_rope", "selective_scan", "causal_conv1d"])
def test_one_token_is_not_padded_to_a_chunk(name: str) -> None:
    case = CASES[name](2, 1)
    (state,) = set(case.arguments) & set(STATES)
    assert largest_value(case) <= 2 * case.arguments[state].size


@pytest.mark.parametrize("name", ["ssd_scan", "ssd_scan_rope", "selective_scan"])
def test_one_token_in_onnxruntime_is_one_step_without_loop_or_padding(name: str) -> None:
    graph = inline_local_functions(CASES[name](1, 1).model("ort")).graph
    choices = [node for node in graph.node if node.op_type == "If"]  # the first branch is that of one token
    for_one = [node for choice in choices for node in walk(next(a.g for a in choice.attribute if a.name == "then_branch"))]
    always = [node for node in graph.node if node not in choices]
    assert not {node.op_type for node in [*always, *for_one]} & {"Pad", "CumSum", "Scan", "Loop"}


def test_selective_scan_makes_no_states_of_all_tokens() -> None:
    case = CASES["selective_scan"](2, 65)
    assert largest_value(case) <= case.arguments["dt_BTC"].size


def test_causal_conv1d_with_one_tap_has_an_empty_state() -> None:
    for flavour in FLAVOURS:
        for bias in (False, True):
            case = CASES["causal_conv1d"](3, 5, L=1, bias=bias)
            model = case.model(flavour)
            for run in (session(model), ReferenceEvaluator(model)):
                judge(case, run.run(None, case.feeds()), 4e-6)


def test_unset_cells_do_no_harm() -> None:
    run = session(attention_case(1, 1).model("ort"))
    case = attention_case(3, 4)
    want = run.run(None, case.feeds())[0]
    for b, end in enumerate(case.arguments["position_B"]):
        for cache in ("cache_k_BKSP", "cache_v_BKSP"):
            case.arguments[cache][b, :, end:] = np.nan
    np.testing.assert_array_equal(run.run(None, case.feeds())[0], want)


def calls(name: str, *changes: dict[str, Any]) -> list[Case]:
    """A call of a case, then one for each set of changes to it."""
    return [CASES[name](3, 5, seed=seed, **change) for seed, change in enumerate(({}, *changes))]


def exact_theta_case() -> Case:
    """Of a theta whose nearest float32, for which `rope_angles_case` stands here, gives other angles."""
    case = rope_angles_case(3, 5)
    case.extra["theta"] = 10000.0001
    case.attributes["exact_theta"] = "10000.0001"
    return case


# Two bodies: the first and the third call need one, the second another. One body: what differs, it reads from the calling node.
TWO_BODIES = {
    "heads": calls("attention", {"H": 2}, {}),
    "half precision": calls("attention", {"half": True}, {}),
    "heads of a packed projection": calls("attention_rope", {"K": 6}, {}),
    "k": calls("router_topk", {"k": 2}, {}),
    "normalisation": calls("router_topk", {"normalize": True}, {}),
    "an absent input": calls("residual_rms_norm", {"scale": False}, {}),
    "scaling of angles": [rope_angles_case(3, 5), rope_angles_case(3, 5, scaling="linear", factor=3.7), rope_angles_case(3, 5, pairs=8)],
    "theta": [rope_angles_case(3, 5), exact_theta_case(), rope_angles_case(3, 5)],
}
ONE_BODY = {
    "heads of a rotation": calls("rope", {"H": 2}),
    "eps": calls("gated_rms_norm", {"eps": 0.1}),
    "channels": calls("causal_conv1d_in_blocks", {"L": 4}),
    "sizes": calls("selective_scan", {"C": 7, "N": 1}),
    "pairs": [rope_angles_case(3, 5, pairs=p) for p in (4, 8)],
}


def assert_each_is_right(model: onnx.ModelProto, feeds: dict[str, np.ndarray], cases: list[Case], flavour: str) -> None:
    """Every node of a model of `joined` gives its own case's numbers, in onnxruntime and, where it can, in the reference evaluator."""
    onnx.checker.check_model(model, full_check=True)
    runs = [session(model)]
    if flavour == "portable":
        runs.append(ReferenceEvaluator(inline_local_functions(model)))  # by itself it takes an op's last overload for every node
    for run in runs:
        got = iter(run.run(None, feeds))
        for case in cases:
            judge(case, [next(got) for _ in case.module.OUTPUTS], 3e-3 if case.half else 4e-6)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", TWO_BODIES)
def test_nodes_that_need_two_bodies_have_each_their_own(name: str, flavour: str) -> None:
    model, feeds = joined(TWO_BODIES[name], flavour)
    assert [function.overload for function in model.functions] == ["", "2"]
    assert [node.overload for node in model.graph.node] == ["", "2", ""]
    assert model.SerializeToString(deterministic=True) == joined(TWO_BODIES[name], flavour)[0].SerializeToString(deterministic=True)
    assert_each_is_right(model, feeds, TWO_BODIES[name], flavour)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", ONE_BODY)
def test_nodes_of_equal_bodies_share_one(name: str, flavour: str) -> None:
    model, feeds = joined(ONE_BODY[name], flavour)
    assert len(model.functions) == 1
    assert not any(item.HasField("overload") for item in (*model.functions, *model.graph.node))
    assert_each_is_right(model, feeds, ONE_BODY[name], flavour)


def test_bodies_of_the_other_flavour_replace_those_there() -> None:
    cases = [CASES[name](3, 5) for name in ("causal_conv1d", "causal_conv1d_in_blocks")]
    model, feeds = joined(cases, "ort")
    assert [node.overload for node in model.graph.node] == ["", "2"]
    assert_each_is_right(model, feeds, cases, "ort")
    onnx_functions.add_bodies(model, "portable")
    assert len(model.functions) == 1
    assert_each_is_right(model, feeds, cases, "portable")


@pytest.mark.parametrize(
    ("op_type", "dtype", "message"),
    [
        ("WmNothing", TensorProto.FLOAT, "no body for wm op WmNothing; known: WmRopeAngles, "),
        ("WmAttention", TensorProto.DOUBLE, "WmAttention node 'node': first input must be float32, float16 or bfloat16, found DOUBLE"),
    ],
)
def test_a_node_without_a_body_is_refused_and_the_model_left_alone(op_type: str, dtype: int, message: str) -> None:
    model = attention_case(1, 1).model("portable")
    model.graph.node[0].op_type = op_type
    model.graph.input[0].type.tensor_type.elem_type = dtype
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match=f"^{message}"):
        onnx_functions.add_bodies(model, "portable")
    assert model.SerializeToString(deterministic=True) == before


# bfloat16: what ONNX Runtime's CUDA provider has kernels for (docs/OperatorKernels.md of its repository, 1.31). Bodies compute in float32.
CUDA_BFLOAT16 = {
    "Add", "Cast", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Gemm", "Identity", "MatMul", "Mul", "RMSNormalization",
    "Reshape", "Scan", "ScatterElements", "Shape", "Sigmoid", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bodies_in_bfloat16_touch_it_only_by_ops_that_cuda_has(name: str) -> None:
    model = CASES[name](2, 5).in_bfloat16()
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(inline_local_functions(model), strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    touching = [node.op_type for node in graph.node if TensorProto.BFLOAT16 in {kinds.get(value) for value in (*node.input, *node.output)}]
    assert set(touching) <= CUDA_BFLOAT16
    takes = any(kind == "T" for _, kind in CASES[name](2, 5).module.INPUTS)
    assert bool(touching) is takes
    assert TensorProto.DOUBLE not in kinds.values() or name.startswith(("rope_angles", "scored_attention"))
