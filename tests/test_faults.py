"""Every planted fault is seen by `wm parity`'s measurement, which passes where nothing is planted."""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fault_catalogue import CONFIGS, FAULTS
from faults import Fault
from wm_graph.taps import ONLY_IN_GRAPHS, OP_OUTPUTS
from wm_runtimes import open_bundle
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
    "pieces": {"draws": 4},
    "far": {"draws": 4, "longest_prompt": PROMPT},
    "float16": {},
}


def by_parity(folder: Path, fault: Fault, **changes: int) -> Failures:
    """What `wm parity` finds wrong on a few rows of unequal length, one of them a single token."""
    # Of more than 8 rows, the second half is fed in two pieces.
    special = {"far": {"draws": 2, "longest_prompt": FAR, "decode_steps": 1}, "pieces": {"draws": 16}}
    settings = {"draws": 4, "longest_prompt": PROMPT, "decode_steps": STEPS} | special.get(fault.shows, {}) | changes
    report = measure_parity(open_bundle(folder), [fault.runtime], options={fault.runtime: fault.options}, **settings)
    return report.rows[0].failures


def sees(bundle: Path, scratch: Path, fault: Fault) -> Failures:
    with fault.planted(bundle, scratch) as folder:
        return by_parity(folder, fault)


def named(faults: list[Fault]) -> dict[str, Any]:
    return {"argvalues": faults, "ids": [fault.id for fault in faults]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns about itself
@pytest.mark.parametrize("fault", **named(list(FAULTS)))
def test_every_fault_is_seen(made: Bundles, tmp_path: Path, fault: Fault) -> None:
    failures = sees(made(CONFIGS[fault.family], fault.dtype)[1], tmp_path, fault)
    assert failures


def _unlike(fault: Fault) -> tuple[Any, ...]:
    """What the measurement depends on besides the fault: of several alike, one needs to be shown to pass."""
    return fault.family, fault.dtype, fault.runtime, fault.graph, fault.shows in ("far", "pieces")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", **named(list({_unlike(fault): fault for fault in FAULTS}.values())))
def test_parity_passes_where_nothing_is_planted(made: Bundles, fault: Fault) -> None:
    assert not by_parity(made(CONFIGS[fault.family], fault.dtype)[1], fault)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", **named([fault for fault in FAULTS if fault.shows != "everywhere"]))
def test_a_fault_shows_only_where_it_says(made: Bundles, tmp_path: Path, fault: Fault) -> None:
    if fault.shows == "float16":
        with suppress(LookupError):  # a float32 file has no such node, or the edit changes nothing that counts
            assert not sees(made(CONFIGS[fault.family], "fp32")[1], tmp_path, fault)
        return
    bundle = made(CONFIGS[fault.family], fault.dtype)[1]
    if fault.shows == "choices":
        failures = sees(bundle, tmp_path, fault)
        assert failures
        assert all("choice" in failure for failure in failures)
        # The budgets of bfloat16 are nearly as wide as it is from one expert to the next.
        assert fault.dtype == "bf16" or "shortfall" in failures[-1]
        return
    with fault.planted(bundle, tmp_path) as folder:
        assert not by_parity(folder, fault, **WELL[fault.shows])


def test_the_catalogue_is_large_and_spread_over_ops_and_kinds() -> None:
    onnx_faults = [fault for fault in FAULTS if fault.graph]
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)
    assert len(onnx_faults) >= 60
    assert len(FAULTS) - len(onnx_faults) >= 30
    # What only the graph for GPUs has is judged beside the plain graph, in test_linear_nodes.py.
    assert set(OP_OUTPUTS) - set(ONLY_IN_GRAPHS) | {"model"} == {fault.op for fault in FAULTS}
    assert {fault.graph for fault in onnx_faults} == {"model.ort.onnx", "model.onnx"}
    assert {fault.runtime for fault in FAULTS} == {"onnxruntime-cpu", "eager", "compiled"}
    shown = Counter(fault.shows for fault in FAULTS)
    assert all(shown[kind] >= 3 for kind in ("decode", "padding", "window", "float16", "choices"))
    assert shown["pieces"] >= 2
    assert shown["far"] >= 1


def test_a_fault_that_no_longer_fits_the_graph_is_an_error_not_a_pass(made: Bundles, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.op == "gated_rms_norm" and fault.graph)
    with pytest.raises(LookupError, match="no body of WmGatedRmsNorm"), fault.planted(made(CONFIGS["llama-tiny"])[1], tmp_path):
        pass
