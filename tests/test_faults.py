"""Every planted fault is seen by the check that should see it, and the same check passes where nothing is planted.

B rows, T tokens.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fault_catalogue import CONFIGS, FAULTS
from faults import Fault
from onnx_cases import CASES
from wm_graph.taps import OP_OUTPUTS
from wm_graph.tolerances import UNIT_ROUNDOFF, model_limit, op_limit
from wm_runtimes import open_bundle, open_session
from wm_runtimes.parity import measure_parity

PROMPT, STEPS = 37, 4  # longer than every window; times four rows no multiple of 16, by which tokens are taken
FAR = 270  # the position's second digit to base 256 counts
Bundles = Callable[..., tuple[Path, Path]]
Failures = tuple[str, ...]

# How a fault of a kind is kept from showing, everything else being the same.
WELL: dict[str, dict[str, int]] = {
    "decode": {"decode_steps": 0},
    "padding": {"draws": 1},
    "window": {"longest_prompt": 2, "decode_steps": 4},
    "pieces": {},
    "far": {"longest_prompt": PROMPT},
    "float16": {},
}


def by_parity(folder: Path, fault: Fault, **changes: int) -> Failures:
    """What `wm parity` finds wrong on a few rows of unequal length, one of them a single token."""
    far = {"draws": 2, "longest_prompt": FAR, "decode_steps": 1} if fault.shows == "far" else {}
    settings = {"draws": 4, "longest_prompt": PROMPT, "decode_steps": STEPS} | far | changes
    report = measure_parity(open_bundle(folder), [fault.runtime], options={fault.runtime: fault.options}, **settings)
    return report.rows[0].failures


def by_split(folder: Path, fault: Fault) -> Failures:
    """A prompt given in two pieces has the logits of the whole prompt."""
    cfg = CONFIGS[fault.family]
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, PROMPT))
    with open_session(open_bundle(folder), fault.runtime, 3, PROMPT, **fault.options) as session:
        whole_BV = session.prefill(tokens_BT)[:, -1]
        session.reset()
        session.prefill(tokens_BT[:, :20])
        split_BV = session.prefill(tokens_BT[:, 20:])[:, -1]
    limit = model_limit("float32", fault.runtime).max_abs * max(1.0, float(np.sqrt(np.square(whole_BV).mean())))
    difference = float(np.abs(split_BV - whole_BV).max())
    return () if difference <= limit else (f"split {difference:.4g} > {limit:.4g}",)


def by_budget(folder: Path, fault: Fault) -> Failures:
    """The op in float32, fed with exact inputs, is within its own budget of what it gives in float64."""
    limit = op_limit(fault.op, "float32", fault.runtime)
    failures = []
    for name, make in CASES.items():
        case = make(3, 65)
        if case.op == fault.op:
            ulps = _ulps(case)
            failures += [f"{name} {ulps:.4g} u > {limit.ulps:.4g} u"] * (not ulps <= limit.ulps)
    return tuple(failures)


def _ulps(case: Any) -> float:
    op, angles = getattr(torch.ops.wm, case.op).default, case.op == "rope_angles"
    narrow = {name: None if value is None else torch.from_numpy(value) for name, value in case.arguments.items()}
    wide = {name: value.double() if value is not None and value.is_floating_point() else value for name, value in narrow.items()}
    found = op(**narrow, **(case.extra | ({"double": False} if angles else {})))
    expected = op(**wide, **(case.extra | ({"double": True} if angles else {})))
    shares = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*map(_tuple, (found, expected)), strict=True)]
    return max(shares) / UNIT_ROUNDOFF["float32"]


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


CHECKS: dict[str, Callable[[Path, Fault], Failures]] = {"parity": by_parity, "split": by_split, "budget": by_budget}


def sees(bundle: Path, scratch: Path, fault: Fault) -> Failures:
    with fault.planted(bundle, scratch) as folder:
        return CHECKS[fault.seen_by](folder, fault)


def named(faults: list[Fault]) -> dict[str, Any]:
    return {"argvalues": faults, "ids": [fault.id for fault in faults]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about itself
@pytest.mark.parametrize("fault", **named(list(FAULTS)))
def test_every_fault_is_seen(made: Bundles, tmp_path: Path, fault: Fault) -> None:
    failures = sees(made(CONFIGS[fault.family], fault.dtype)[1], tmp_path, fault)
    assert failures


def _unlike(fault: Fault) -> tuple[Any, ...]:
    """What the check depends on besides the fault: of several alike, one needs to be shown to pass."""
    op = fault.op if fault.seen_by == "budget" else ""
    return fault.family, fault.dtype, fault.runtime, fault.graph, fault.seen_by, fault.shows == "far", op


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", **named(list({_unlike(fault): fault for fault in FAULTS}.values())))
def test_the_same_check_passes_where_nothing_is_planted(made: Bundles, fault: Fault) -> None:
    assert not CHECKS[fault.seen_by](made(CONFIGS[fault.family], fault.dtype)[1], fault)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", **named([fault for fault in FAULTS if fault.shows != "everywhere"]))
def test_a_fault_shows_only_where_it_says(made: Bundles, tmp_path: Path, fault: Fault) -> None:
    if fault.shows == "float16":
        with suppress(LookupError):  # a float32 file has no such node, or the edit changes nothing that counts
            assert not sees(made(CONFIGS[fault.family], "fp32")[1], tmp_path, fault)
        return
    with fault.planted(made(CONFIGS[fault.family], fault.dtype)[1], tmp_path) as folder:
        assert not by_parity(folder, fault, **WELL[fault.shows])


def test_the_catalogue_is_large_and_spread_over_ops_and_kinds() -> None:
    onnx_faults = [fault for fault in FAULTS if fault.graph]
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert len(onnx_faults) >= 60
    assert len(FAULTS) - len(onnx_faults) >= 30
    assert set(OP_OUTPUTS) | {"model"} == {fault.op for fault in FAULTS}
    assert {fault.graph for fault in onnx_faults} == {"model.ort.onnx", "model.onnx"}
    assert {fault.runtime for fault in FAULTS} == {"onnxruntime-cpu", "eager", "compiled"}
    shown = Counter(fault.shows for fault in FAULTS)
    assert all(shown[kind] >= 3 for kind in ("decode", "padding", "window", "float16"))
    assert shown["pieces"] >= 2
    assert shown["far"] >= 1


def test_a_fault_that_no_longer_fits_the_graph_is_an_error_not_a_pass(made: Bundles, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.op == "gated_rms_norm" and fault.graph)
    with pytest.raises(LookupError, match="no body of WmGatedRmsNorm"), fault.planted(made(CONFIGS["llama-tiny"])[1], tmp_path):
        pass
