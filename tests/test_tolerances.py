"""Every row of the table of op limits, measured. B rows, T tokens."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from onnx_cases import CASES, Case, letters
from wm_graph.tolerances import OP_LIMITS, UNIT_ROUNDOFF, OpLimit

CASE_OF = {"keep_window_attention": "keep_window"}
CALLS = ((3, 65), (2, 1), (1, 130))
COPIES = ("next_k", "next_v", "next_score", "next_position", "expert")  # what an op stores or chooses is not rounded


def arguments(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The op's arguments; those in the model's dtype rounded to it."""
    kinds = dict(case.module.INPUTS)
    return {
        name: None if value is None else torch.from_numpy(value).to(dtype if kinds[name] == "T" else torch.from_numpy(value).dtype)
        for name, value in case.arguments.items()
    }


def call(case: Case, values: dict[str, Tensor | None], **extra: Any) -> list[np.ndarray]:
    """The op's outputs in float64."""
    out = getattr(torch.ops.wm, case.op).default(*values.values(), *(case.extra | extra).values())
    return [value.double().numpy() for value in (out if isinstance(out, tuple) else (out,))]


def in_float64(case: Case, values: dict[str, Tensor | None]) -> list[np.ndarray]:
    return call(
        case, {name: value.double() if value is not None and value.is_floating_point() else value for name, value in values.items()}
    )


def in_torch(case: Case, values: dict[str, Tensor | None], limit: OpLimit) -> list[np.ndarray]:
    single = {"double": False} if case.op == "rope_angles" else {}
    if limit.runtime == "eager":
        return call(case, values, **single)
    op, rest = getattr(torch.ops.wm, case.op).default, tuple((case.extra | single).values())
    torch._dynamo.reset()
    out = torch.compile(lambda *inputs: op(*inputs, *rest), backend="eager", fullgraph=True)(*values.values())
    return [value.double().numpy() for value in (out if isinstance(out, tuple) else (out,))]


def in_onnxruntime(case: Case, values: dict[str, Tensor | None], flavour: str) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = ort.InferenceSession(case.model(flavour).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = model.run(None, {name: value.numpy() for name, value in values.items() if value is not None})
    return [value.astype(np.float64) for value in found]


def ulps(case: Case, found: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> float:
    """Largest error of a computed output in units of u · max |reference|; padding has no meaning."""
    worst = 0.0
    for (name, _), value, reference in zip(case.module.OUTPUTS, found, expected, strict=True):
        if name.startswith(COPIES):
            continue
        if letters(name)[:2] == ["B", "T"] and (valid_B := case.arguments.get("valid_B")) is not None:
            live_BT = np.arange(value.shape[1]) < valid_B[:, None]
            value, reference = value[live_BT], reference[live_BT]
        worst = max(worst, float(np.abs(value - reference).max() / np.abs(reference).max() / UNIT_ROUNDOFF[dtype]))
    return worst


@pytest.mark.parametrize("limit", OP_LIMITS, ids=lambda limit: f"{limit.op}-{limit.dtype}-{limit.runtime}")
def test_op_is_within_its_limit(limit: OpLimit) -> None:
    dtype = getattr(torch, limit.dtype)
    half = {"half": True} if limit.dtype == "float16" else {}
    for seed, (B, T) in enumerate(CALLS):
        case = CASES[CASE_OF.get(limit.op, limit.op)](B, T, seed=seed, **half)
        values = arguments(case, dtype)
        expected = in_float64(case, values)
        if limit.runtime == "onnxruntime-cpu":
            answers = [in_onnxruntime(case, values, flavour) for flavour in ("portable", "ort")]
        else:
            answers = [in_torch(case, values, limit)]
        for found in answers:
            measured = ulps(case, found, expected, limit.dtype)
            assert measured <= limit.ulps, (B, T)
