"""Linear layers of the graph for GPUs in half precision: what joins them, what it leaves alone, and that numbers stay.

M rows   K inputs   A, B, C, H widths of the parts
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

from helpers import FAMILIES
from test_export import next_inputs, random_inputs
from wm_export.linear_nodes import join_linear_layers, linear_uses
from wm_graph.tolerances import UNIT_ROUNDOFF
from wm_kernels.native import Use
from wm_kernels.onnx_functions import add_bodies

GEMM = "y = Gemm <transB = 1> (x, w)"
GATE = GEMM + "  g, u = Split <axis = 1, num_outputs = 2> (y)  s = Sigmoid(g)  p = Mul(g, s)  z = Mul(p, u)"
WIDE = "f = Cast <to = 1> (d)  t = Cast <to = 1> (bias_3)  sum = Add(f, t)  dt = Softplus(sum)"
UP_GATES = GATE.replace("Sigmoid(g)", "Sigmoid(u)").replace("Mul(g, s)", "Mul(u, s)").replace("Mul(p, u)", "Mul(p, g)")
STEPS = GEMM + "  a, b, c, d = Split <axis = 1> (y, sizes_4233)  " + WIDE
WEIGHTS = {"w": (12, 8), "bias_12": (12,), "bias_3": (3,), "bias_1": (1,), "rows": (12, 12), "turned": (8, 12)}
SIZES = {"sizes_57": [5, 7], "sizes_4233": [4, 2, 3, 3], "sizes_3333": [3, 3, 3, 3], "sizes_of_rows": [5, 7]}
Widths = tuple[int, int, int, int, int]  # A, B, C, H, gated


def model_of(text: str, outputs: str, dtype: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """A graph of 12 rows x of 8 columns, in onnx's own text, with the weights that it reads."""
    body = onnx.parser.parse_graph(f"g (float16[12, 8] x) => () {{ {text} }}")
    rng, found = np.random.default_rng(0), {name for node in body.node for name in node.input}
    kind = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    values = {name: (rng.standard_normal(shape) / 3).astype(kind) for name, shape in WEIGHTS.items()}
    values |= {name: np.array(sizes) for name, sizes in SIZES.items()}
    body.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items() if name in found)
    for place, node in enumerate(body.node):
        node.name = f"node_{place}"
    body.input[0].type.tensor_type.elem_type = dtype
    body.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs.split())
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid(*one) for one in (("", 23), ("wm", 1))], ir_version=10)
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
    return model


def joined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose linear layers are joined, with bodies."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    join_linear_layers(made)
    add_bodies(made, "portable")
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Its outputs by name, from ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    given = model if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def widths(node: onnx.NodeProto) -> Widths:
    values = {item.name: item.i for item in node.attribute}
    return tuple(values[name] for name in ("A", "B", "C", "H", "gated"))  # type: ignore[return-value]


def assert_alike(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """The same outputs, of the same types, apart by the rounding that the joined node spares."""
    feeds = {"x": np.random.default_rng(1).standard_normal((12, 8)).astype(np.float16)}
    expected, found = run(before, feeds), run(after, feeds)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        allowed = 4 * UNIT_ROUNDOFF["float16"] * np.abs(value).max()
        np.testing.assert_allclose(found[name].astype(float), value.astype(float), rtol=0, atol=allowed, err_msg=name)


# text, outputs, the widths of the one node that is left
WHOLLY: dict[str, tuple[str, str, Widths]] = {
    "a layer alone": (GEMM, "y", (12, 0, 0, 0, 0)),
    "a layer with a bias": ("y = Gemm <transB = 1> (x, w, bias_12)", "y", (12, 0, 0, 0, 0)),
    "two parts": (GEMM + "  a, b = Split <axis = 1> (y, sizes_57)", "a b", (5, 7, 0, 0, 0)),
    "halves that are not gated": (GEMM + "  a, b = Split <axis = -1, num_outputs = 2> (y)", "a b", (6, 6, 0, 0, 0)),
    "three parts": (GEMM + "  a, b, c = Split <axis = 1, num_outputs = 3> (y)", "c a b", (4, 4, 4, 0, 0)),
    "sizes of a node": (GEMM + "  n = Constant <value = int64[2] {3, 9}> ()  a, b = Split <axis = 1> (y, n)", "a b", (3, 9, 0, 0, 0)),
    "parts and steps": (STEPS, "a b c dt", (4, 2, 3, 3, 0)),
    "the other order of a sum": (STEPS.replace("Add(f, t)", "Add(t, f)"), "a b c dt", (4, 2, 3, 3, 0)),
    "steps without a bias": (STEPS.replace("Softplus(sum)", "Softplus(f)").replace("t = Cast <to = 1> (bias_3)  sum = Add(f, t)  ", ""),
                             "a b c dt", (4, 2, 3, 3, 0)),
    "steps alone": (GEMM + "  " + WIDE.replace("(d)", "(y)").replace("bias_3", "bias_12"), "dt", (0, 0, 0, 12, 0)),
    "a gate": (GATE, "z", (6, 0, 0, 0, 1)),
    "a gate whose factors are exchanged": (GATE.replace("Mul(g, s)", "Mul(s, g)").replace("Mul(p, u)", "Mul(u, p)"), "z", (6, 0, 0, 0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLLY)
def test_a_layer_and_all_that_follows_it_become_one_node(name: str) -> None:
    text, outputs, expected = WHOLLY[name]
    before = model_of(text, outputs)
    after = joined(before)
    assert [(node.op_type, widths(node)) for node in after.graph.node] == [("WmLinear", expected)]
    assert_alike(before, after)


# name, outputs, what is done to the node
PLANTED: dict[str, tuple[str, str, Callable[[onnx.NodeProto], object]]] = {
    "the bias of the steps is forgotten": (STEPS, "a b c dt", lambda node: node.input.__setitem__(3, "")),
    "the bias is forgotten": ("y = Gemm <transB = 1> (x, w, bias_12)", "y", lambda node: node.input.__setitem__(2, "")),
    "two parts are exchanged": (GEMM + "  a, b = Split <axis = 1, num_outputs = 2> (y)", "a b", lambda node: exchange(node, 0, 1)),
}


def exchange(node: onnx.NodeProto, *places: int) -> None:
    """Two outputs of a node, each in the place of the other."""
    one, other = places
    node.output[one], node.output[other] = node.output[other], node.output[one]


@pytest.mark.parametrize("name", PLANTED)
def test_a_node_that_is_wrong_is_not_alike(name: str) -> None:
    text, outputs, plant = PLANTED[name]
    before = model_of(text, outputs)
    after = joined(before)
    plant(after.graph.node[0])
    add_bodies(after, "portable")
    del after.graph.value_info[:]
    with pytest.raises(AssertionError):
        assert_alike(before, after)


# text, outputs, widths of the node, what else is left
PARTLY: dict[str, tuple[str, str, Widths, str]] = {
    "the whole is an output too": (GATE, "y z", (12, 0, 0, 0, 0), "Split Sigmoid Mul Mul"),
    "the whole is read by another": (GATE + "  more = Neg(y)", "z more", (12, 0, 0, 0, 0), "Split Sigmoid Mul Mul Neg"),
    "rows are split": (GEMM + "  a, b = Split <axis = 0> (y, sizes_of_rows)", "a b", (12, 0, 0, 0, 0), "Split"),
    "rows are split by default": (GEMM + "  a, b = Split <num_outputs = 2> (y)", "a b", (12, 0, 0, 0, 0), "Split"),
    "four parts": (GEMM + "  a, b, c, d = Split <axis = 1> (y, sizes_3333)", "a b c d", (12, 0, 0, 0, 0), "Split"),
    "a gate is read again": (GATE, "g z", (6, 6, 0, 0, 0), "Sigmoid Mul Mul"),
    "what a gate lets through is read again": (GATE, "u z", (6, 6, 0, 0, 0), "Sigmoid Mul Mul"),
    "a sigmoid is read again": (GATE, "s z", (6, 6, 0, 0, 0), "Sigmoid Mul Mul"),
    "a gate itself is read again": (GATE, "p z", (6, 6, 0, 0, 0), "Sigmoid Mul Mul"),
    "the second half is the gate's": (UP_GATES,
                                      "z", (6, 6, 0, 0, 0), "Sigmoid Mul Mul"),
    "a gate of another function": (GATE.replace("Sigmoid", "Tanh"), "z", (6, 6, 0, 0, 0), "Tanh Mul Mul"),
    "a gate is multiplied with the sigmoid alone": (
        GATE.replace("Mul(g, s)", "Mul(s, s)").replace("Mul(p, u)", "Sum(p, u, g)"), "z", (6, 6, 0, 0, 0), "Sigmoid Mul Sum"),
    "steps are read before softplus": (STEPS, "a b c sum dt", (12, 0, 0, 0, 0), "Split Cast Cast Add Softplus"),
    "steps are read in half precision": (STEPS, "a b c d dt", (12, 0, 0, 0, 0), "Split Cast Cast Add Softplus"),
    "a bias of steps is read again": (STEPS + "  more = Neg(t)", "a b c dt more", (12, 0, 0, 0, 0), "Split Cast Cast Add Softplus Neg"),
    "a bias of steps is one number": (STEPS.replace("bias_3", "bias_1"), "a b c dt", (12, 0, 0, 0, 0), "Split Cast Cast Add Softplus"),
    "steps are doubled": (STEPS.replace("Add(f, t)", "Add(f, f)"), "a b c dt t", (12, 0, 0, 0, 0), "Split Cast Cast Add Softplus"),
    "steps of another function": (STEPS.replace("Softplus", "Exp"), "a b c dt", (12, 0, 0, 0, 0), "Split Cast Cast Add Exp"),
    "wide, and no step": (GEMM + "  f = Cast <to = 1> (y)  z = Neg(f)", "z", (12, 0, 0, 0, 0), "Cast Neg"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_what_something_else_reads_too_stays_and_so_does_what_is_not_of_the_form(name: str) -> None:
    text, outputs, expected, left = PARTLY[name]
    before = model_of(text, outputs)
    after = joined(before)
    assert kinds(after) == Counter([*left.split(), "WmLinear"])
    assert [widths(node) for node in after.graph.node if node.op_type == "WmLinear"] == [expected]
    assert_alike(before, after)


NOT_AT_ALL = {
    "a multiple": "y = Gemm <transB = 1, alpha = 2.0> (x, w)",
    "a multiple of the bias": "y = Gemm <transB = 1, beta = 2.0> (x, w, bias_12)",
    "a weight by its columns": "y = Gemm (x, turned)",
    "a weight that is computed": "v = Neg(w)  y = Gemm <transB = 1> (x, v)",
    "a bias that is computed": "v = Neg(bias_12)  y = Gemm <transB = 1> (x, w, v)",
    "a bias of every row": "y = Gemm <transB = 1> (x, w, rows)",
    "a bias of one number": "y = Gemm <transB = 1> (x, w, bias_1)",
}


@pytest.mark.parametrize("name", NOT_AT_ALL)
def test_other_products_stay(name: str) -> None:
    before = model_of(NOT_AT_ALL[name], "y")
    assert kinds(joined(before)) == kinds(before)


def test_products_in_float32_stay() -> None:
    before = model_of(GATE, "z", TensorProto.FLOAT)
    assert kinds(joined(before)) == kinds(before)


def test_sizes_that_nobody_reads_any_more_leave_the_graph() -> None:
    before = model_of(STEPS, "a b c dt")
    assert {item.name for item in before.graph.initializer} == {"w", "bias_3", "sizes_4233"}
    assert {item.name for item in joined(before).graph.initializer} == {"w", "bias_3"}


def test_uses_are_told_once_each_with_their_sizes_in_the_order_of_the_graph() -> None:
    text = STEPS + "  o = Gemm <transB = 1> (x, w)  n = Gemm <transB = 1> (x, w)  q = Gemm <transB = 1> (x, w, bias_12)"
    uses = linear_uses(joined(model_of(text, "a b c dt o n q")))
    half, sizes = torch.float16, (("M", None), ("K", 8), ("N", 12))

    def use(parts: tuple[int, int, int, int], names: tuple[str, ...], more: tuple[tuple[str, int], ...] = ()) -> Use:
        plain: tuple[tuple[str, Any], ...] = (*zip("ABCH", parts, strict=True), ("gated", False))
        return Use("linear", plain, tuple((name, half) for name in names), (*sizes, *more))

    whole = (12, 0, 0, 0)
    assert uses == [
        use((4, 2, 3, 3), ("x_MK", "weight_NK", "step_bias_H"), (("H", 3),)),
        use(whole, ("x_MK", "weight_NK")),
        use(whole, ("x_MK", "weight_NK", "bias_N")),
    ]
    assert [bool(value) for value in dict(linear_uses(joined(model_of(GATE, "z")))[0].plain).values()] == [True, False, False, False, True]


# Exports. Every layer of theirs is a product with a weight.
MODELS = ("cheems-tiny-moe", "mamba2-tiny", "jamba-tiny")


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those with a weight."""
    weights = {item.name for item in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul") and weights & set(node.input)]


def loaded(bundle: Path, file: str) -> onnx.ModelProto:
    return onnx.load(bundle / file, load_external_data=False)


@pytest.mark.parametrize("name", MODELS)
def test_no_product_with_a_weight_is_left_in_half_precision(made: Any, name: str) -> None:
    bundle = made(FAMILIES[name], "fp16")[1]
    plain, tuned = loaded(bundle, "model.onnx"), loaded(bundle, "model.cuda.onnx")
    assert products(plain)
    assert not products(tuned)
    assert kinds(tuned)["WmLinear"] == len(products(plain))
    assert not kinds(plain)["WmLinear"]
    joined_widths = [widths(node) for node in tuned.graph.node if node.op_type == "WmLinear"]
    assert kinds(plain)["Softplus"] == sum(H > 0 for *_, H, _ in joined_widths) > 0
    assert not kinds(tuned)["Softplus"]
    gates = sum(feed_forward == "mlp" for _, feed_forward in FAMILIES[name].layers) + kinds(plain)["WmExpertMix"]
    assert kinds(plain)["Sigmoid"] - kinds(tuned)["Sigmoid"] == sum(gated for *_, gated in joined_widths) == gates
    stored = [{item.name for item in model.graph.initializer if item.external_data} for model in (plain, tuned)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("name", MODELS)
def test_float32_keeps_its_products(made: Any, name: str) -> None:
    bundle = made(FAMILIES[name])[1]
    plain, tuned = loaded(bundle, "model.onnx"), loaded(bundle, "model.cuda.onnx")
    assert [(node.op_type, *node.input[1:]) for node in products(tuned)] == [(node.op_type, *node.input[1:]) for node in products(plain)]
    assert not kinds(tuned)["WmLinear"]


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_of_joined_layers_agrees_with_the_plain_one(made: Any, name: str, tokens: int) -> None:
    """Two independent roads from the same weights: prefill, then a token, each on its own state."""
    cfg, bundle = FAMILIES[name], made(FAMILIES[name], "fp16")[1]
    found: dict[str, list[np.ndarray]] = {}
    for file in ("model.onnx", "model.cuda.onnx"):
        types = {value.name: value.type.tensor_type.elem_type for value in loaded(bundle, file).graph.input}
        inputs, found[file] = random_inputs(cfg, 3, tokens, 16), []
        for step in range(2):
            feeds = {key: value.astype(onnx.helper.tensor_dtype_to_np_dtype(types[key])) for key, value in inputs.items()}
            outputs = run(bundle / file, feeds)
            real = inputs["select"] < inputs["valid"][:, None]
            found[file].append(outputs["logits"][real])
            inputs = next_inputs(cfg, outputs, seed=step)
    for plain, tuned in zip(*found.values(), strict=True):
        u, rms = UNIT_ROUNDOFF["float16"], np.sqrt(np.square(plain).mean())
        # A gate's factors are rounded in one file and not in the other: 1.9 u in rms, 9.9 u at worst.
        assert np.sqrt(np.square(tuned - plain).mean()) <= 4 * u * rms
        assert np.abs(tuned - plain).max() <= 20 * u * rms
