"""Laws of the ONNX bodies in onnxruntime: each equals the op in float64, over drawn cases, whole and cut into calls that pass state on.

B rows, T tokens. One session serves all cases of the same sizes and attributes.
"""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypothesis_profiles import law
from onnx_cases import Case
from op_calls import OUTPUTS, STATEFUL, Call, Named, axes, judged, near
from op_scales import rounded, scales
from strategies_ops import CASES, LAST, cut_cases, product_key_cases

FLAVOURS = ["portable", "ort"]
RUNTIME = "onnxruntime-cpu"


def node_of(call: Call) -> Case:
    """The call as a model of one node."""
    arrays = {name: None if value is None else _array(value) for name, value in call.tensors.items()}
    half = any(value is not None and value.dtype == torch.float16 for value in call.tensors.values())
    return Case(call.op, arrays, call.attributes, call.plain, half)


def _array(value: torch.Tensor) -> np.ndarray:
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()


_CASES: dict[Any, Case] = {}


@cache
def _session(key: Any, flavour: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(_CASES[key].model(flavour).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnx(call: Call, flavour: str) -> Named:
    """Outputs of the op's body in onnxruntime, states under their own names."""
    case = node_of(call)
    fixed = {name: _fixed_sizes(name, value) for name, value in case.arguments.items() if value is not None}
    key = (call.op, case.half, repr(sorted(case.attributes.items())), repr(fixed))
    _CASES.setdefault(key, case)
    outputs = _session(key, flavour).run(None, case.feeds())
    return {name: torch.from_numpy(value) for name, value in zip(OUTPUTS[call.op], outputs, strict=True)}


def _fixed_sizes(name: str, value: np.ndarray) -> list[int]:
    """The sizes that the model of a node is made for; the others vary from run to run."""
    return [size for letter, size in zip(axes(name), value.shape, strict=True) if letter not in "BTSWM"]


def complete(call: Call) -> Call:
    """The call with states and `valid` given, as a graph has them."""
    return call.with_states().changed({"valid_B": call.count_B}) if "valid_B" in call.tensors else call


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("op", CASES)
@law(40, "op")
@given(data=st.data(), dtype=st.sampled_from((torch.float32, torch.float16)))
def test_onnx_body_equals_the_op_in_float64(op: str, flavour: str, dtype: torch.dtype, data: st.DataObject) -> None:
    call = complete(data.draw(CASES[op]).call())
    call = rounded(call, dtype)
    call = call.to(torch.float32) if torch.bfloat16 in {value.dtype for value in call.tensors.values() if value is not None} else call
    expected = judged(call, call.double().run())
    near(call, judged(call, run_onnx(call, flavour)), expected, scales(call), flavour, RUNTIME)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("op", STATEFUL)
@law(16, "op")
@given(data=st.data())
def test_onnx_body_cut_into_calls_equals_the_whole_in_float64(op: str, flavour: str, data: st.DataObject) -> None:
    case, where = data.draw(cut_cases(CASES[op]))
    call = complete(case.call()).to(torch.float32)
    bounds = [0, *where, case.T]
    states: Named = {}
    parts = []
    for start, end in pairwise(bounds):
        found = run_onnx(call.piece(start, end).changed(states), flavour)
        states = {name: found[name] for name in call.states}
        parts.append(found[OUTPUTS[op][0]])
    expected = judged(call, call.double().run())
    # Every call rounds the state that it passes on.
    scale = {name: len(parts) * value for name, value in scales(call).items()}
    near(call, judged(call, {OUTPUTS[op][0]: torch.cat(parts, 1), **states}), expected, scale, f"{flavour}, cut before {where}", RUNTIME)


@pytest.mark.parametrize("flavour", FLAVOURS)
@law(60, "op")
@given(case=product_key_cases("grid"), dtype=st.sampled_from((torch.float32, torch.float16)))
def test_onnx_body_gives_equal_product_keys_to_the_lower_expert(flavour: str, dtype: torch.dtype, case: Any) -> None:
    call = case.call().to(dtype)
    expected = call.double().run()
    near(call, run_onnx(call, flavour), expected, scales(call), flavour, RUNTIME)


@pytest.mark.parametrize("flavour", FLAVOURS)
@law(60, "op")
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    start=st.one_of(st.integers(0, 300), st.integers(0, LAST - 300)),
    pairs=st.sampled_from((1, 8)),
    scaling=st.sampled_from(("none", "linear", "llama3", "dynamic")),
)
def test_onnx_rope_angles_equal_the_op_in_float64_to_the_last_position(
    flavour: str, lengths: list[int], start: int, pairs: int, scaling: str
) -> None:
    position = start + torch.arange(max(lengths)) + torch.zeros(len(lengths), 1, dtype=torch.int64)
    base = {"pairs": pairs, "theta": 1e4}
    numbers = {"factor": 4.3, "original": 60, "low": 1.1, "high": 3.9}
    more = {} if scaling == "none" else {"scaling": scaling} | numbers
    tensors = {"position_BT": position}
    if scaling == "dynamic":
        tensors["length_B"] = torch.tensor(lengths) + start
    attributes = base | {name: repr(value) if isinstance(value, float) else value for name, value in more.items()}
    call = Call("rope_angles", dict(tensors), base | {"double": True} | more, attributes)
    scale = dict.fromkeys(OUTPUTS["rope_angles"], 1.0)
    near(call, run_onnx(call, flavour), call.run(), scale, f"{flavour}, {scaling}", RUNTIME)
