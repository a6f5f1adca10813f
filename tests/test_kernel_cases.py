"""The cases of benchmarks/kernels.py leave out no op, no exact mode and no design of the scans.

B rows   T tokens   H heads   P head dimension   G groups   N state   F rotated pairs
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import wm_kernels
from triton_support import DEVICE, ON_CUDA, needs_triton, random
from wm_kernels import native_ops, numerics
from wm_kernels.ssd_scan import ssd_scan_reference
from wm_kernels.triton_configs import config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
has_triton, interpreted = needs_triton
SAME_IN_EXACT = {"causal_conv1d", "gated_rms_norm", "residual_rms_norm", "rope", "rope_angles"}


@pytest.fixture
def modules(monkeypatch):
    """Import a benchmark's module by name; they lie outside the packages."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in ("kernel_cases", "first_calls")]:
        sys.modules.pop(name)


def public_ops():
    """Those that have Triton kernels, by name without the mark of the form in place."""
    return {name.removesuffix("_") for name in wm_kernels.__all__} & set(native_ops.OPS)


def test_every_op_with_a_triton_kernel_has_a_case(modules):
    assert public_ops() == set(native_ops.OPS)
    assert public_ops() <= {case.op for case in modules("kernel_cases").all_cases()}


def test_every_op_whose_exact_mode_launches_something_else_has_an_exact_case(modules):
    exact = {case.op for case in modules("kernel_cases").all_cases() if "exact" in case.name and any("time ÷" in bar for bar in case.bars)}
    # Scans with and without rotation share their kernel of single tokens.
    assert public_ops() - SAME_IN_EXACT == exact | {"ssd_scan"}


def launched(op, call, monkeypatch):
    """What a call in each mode would launch."""
    module, plans = importlib.import_module(f"wm_kernels.{op}.triton_op"), {}
    monkeypatch.setattr(module, "run", lambda plan, tensors: plans.update({mode: plan.launches}))
    for mode in ("fast", "exact"):
        with numerics(mode):
            call(vars(module)[f"{op}_triton"])
    return plans


@pytest.mark.parametrize("T", [1, 5, 700])
@pytest.mark.parametrize("op", sorted(SAME_IN_EXACT))
@has_triton
@interpreted
def test_exact_mode_launches_what_fast_does(op, T, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, weight, angles = random(g, T, 64), random(g, 64), random(g, 1, T, 16)
    calls = {
        "causal_conv1d": lambda run: run(x[None], random(g, 64, 4), weight, random(g, 1, 3, 64), None, "silu"),
        "gated_rms_norm": lambda run: run(x, x, weight, 1e-6),
        "residual_rms_norm": lambda run: run(x, x, None, weight, 1e-6),
        "rope": lambda run: run(x.view(1, T, 2, 32), angles, angles),
        "rope_angles": lambda run: run(torch.arange(T)[None], 16, 1e4, None, "none", 1.0, 1, 1.0, 4.0),
    }
    plans = launched(op, calls[op], monkeypatch)
    # But for the stride of a single row, over which nothing steps.
    fast, same = ([(launch.kernel, launch.grid, launch.constants, launch.options) for launch in plans[mode]] for mode in ("fast", "exact"))
    assert fast == same


def call_of(case):
    """What the plan of a prefill sees on an H100; `make` holds its sizes."""
    from wm_kernels.ssd_scan.plan import ScanCall

    B, T, H, P, G, N, F, _ = case.make.args
    return ScanCall(
        op=case.op, arch="sm_90", dtype=torch.bfloat16, B=B, T=T, H=H, P=P, G=G, N=N, F=F,
        x_BTH=(T * H * P, H * P, P), dt_BTH=(T * H, H, 1), A_H=(1,), B_BTG=(T * G * N, G * N, N), C_BTG=(T * G * N, G * N, N),
        cos_BT=(T * F, F), sin_BT=(T * F, F), state_BHN=(0, 0, 0), out_BHN=(H * N * P, N * P, P), has_state=False, has_valid=False,
    )  # fmt: skip


@has_triton
@interpreted
def test_a_prefill_stands_beside_every_design_but_the_one_that_it_chooses(modules):
    from wm_kernels.ssd_scan.plan import plan, regime

    ssd = modules("kernel_cases.ssd")
    cases = {case.name: case for case in ssd.cases() if case.designs}
    calls = {name: call_of(case) for name, case in cases.items()}
    chosen = {name: regime(call) for name, call in calls.items()}
    assert set(chosen.values()) == set(ssd.DESIGNS)
    for name, case in cases.items():
        own = plan(calls[name])
        others = {other: plan(calls[name], other) for other in ssd.DESIGNS if other != chosen[name]}
        shown = {other for other in others if f"as {other}" in case.designs}
        assert f"as {chosen[name]}" not in case.designs
        assert all(others[other] != own for other in shown), name
        # What is not shown would launch what another design does.
        assert all(any(others[other] == made for made in (own, others.get("crowd"))) for other in others.keys() - shown), name


@has_triton
@interpreted
def test_each_design_is_launched_as_itself_and_is_right(modules, monkeypatch):
    from wm_kernels.ssd_scan import triton_op

    ssd, plans, run = modules("kernel_cases.ssd"), {}, triton_op.run
    g = torch.Generator().manual_seed(0)
    B, T, H, P, N = 1, 1030 if ON_CUDA else 90, 2, 16, 16
    x, b, c = random(g, B, T, H, P), random(g, B, T, 1, N), random(g, B, T, 1, N)
    dt, A = torch.nn.functional.softplus(random(g, B, T, H)), -torch.linspace(0.1, 4, H, device=DEVICE)
    expected = ssd_scan_reference(*(value.double() for value in (x, dt, A, b, c)), None, None)

    def noted(plan, tensors):
        plans[name] = plan
        run(plan, tensors)

    monkeypatch.setattr(triton_op, "run", noted)
    for name in ssd.DESIGNS:
        call = ssd.by_design(name, lambda given: triton_op.ssd_scan_triton(*given))
        for found, truth in zip(call((x, dt, A, b, c, None, None)), expected, strict=True):
            assert torch.allclose(found.double(), truth, atol=1e-3), name
    starts = {name: (plan.launches[-1].constants["START"], plan.launches[-1].grid[-1] > 1) for name, plan in plans.items()}
    assert starts["fold"] == ("fold", True)
    assert starts["carry"] == ("carried", True)
    assert all(starts[name] == ("initial", False) for name in ("sweep", "crowd", "narrow"))


def test_every_regime_of_the_scans_can_be_tuned(modules):
    from wm_kernels.ssd_scan.plan import REGIMES

    spaces = {space.regime: space for space in modules("kernel_cases.ssd").spaces()}
    assert set(spaces) == set(REGIMES)
    # The table's own thresholds stay: the tuner forces a regime by its plan.
    for regime, space in spaces.items():
        chosen = config(space.case.op, "sm_90", "bfloat16", regime, ())
        kept = {"programs", "up_to", "least_tokens"} & set(chosen)
        assert {name: space.start[name] for name in kept} == {name: chosen[name] for name in kept}


def test_the_answer_in_pieces_is_that_of_the_whole(modules, monkeypatch):
    ssd, g = modules("kernel_cases.ssd"), torch.Generator().manual_seed(0)
    B, T, H, P, N, F = 2, 50, 2, 8, 8, 4
    dt, angle = torch.rand((B, T, H), generator=g), torch.rand((B, T, F), generator=g)
    x, b, c = (torch.randn(shape, generator=g) for shape in ((B, T, H, P), (B, T, H, N), (B, T, H, N)))
    inputs = {"x": x, "dt": dt, "A": -torch.ones(H), "B": b, "C": c, "state": None}
    for given in (inputs, inputs | {"cos": angle.cos(), "sin": angle.sin()}):
        whole = ssd.reference(given)
        monkeypatch.setattr(ssd, "PIECE", 7)
        pieces = ssd.reference(given)
        monkeypatch.undo()
        for found, expected in zip(pieces, whole, strict=True):
            assert found.dtype == torch.float64
            assert torch.allclose(found, expected, atol=1e-12)


def running_sums(by_call):
    """Adds tokens up in the state; with `by_call` also how many came at once, which a split changes."""

    def call(v):
        out = v["x"].cumsum(1) + v["state"].unsqueeze(1) + (v["x"].shape[1] * by_call)
        v["state"].copy_(out[:, -1])
        return out

    return call


@pytest.mark.parametrize("by_call", [False, True])
def test_a_split_that_changes_bits_is_noticed(modules, by_call):
    v = {"x": torch.arange(1.0, 8.0).view(1, 7), "state": torch.zeros(1), "position": torch.zeros(1, dtype=torch.int64)}
    assert modules("kernel_cases._common").split_alike(v, ["x"], ["state"], running_sums(by_call)) is not by_call
    assert torch.equal(v["state"], torch.zeros(1))


def test_exact_cases_run_and_are_judged_in_exact_mode(modules):
    from wm_kernels.numerics import exact

    cases, common = modules("kernel_cases"), modules("kernel_cases._common")
    case = cases.Case("a", "M", "bfloat16", dict, lambda v: exact(), lambda v: float(exact()), {"p": dict}, bars={"× p": 1.0})
    made = common.exactly(case, "step", 16, lambda v: exact())
    assert (made.name, made.bars, made.peers) == ("M exact", {"time ÷ step": 32.0}, {})
    assert (made.ours({}), made.oracle({}), exact()) == (True, 1.0, False)
    assert replace(made).oracle is made.oracle
    assert common.exactly(case, "step", 16, lambda v: False).oracle({}) == float("inf")


def test_first_calls_are_those_of_every_op_and_of_kernels_that_its_first_case_lacks(modules):
    first_calls = modules("first_calls")
    found = first_calls.chosen([], False)
    assert {op for op, _ in found} >= public_ops()
    assert set(first_calls.ALSO) <= set(found)
    assert first_calls.chosen(["moe_mix"], False) == [("moe_mix", "E 64 k 8"), ("moe_mix", "E 64 k 8, own")]
    assert len(first_calls.chosen(["moe_mix"], True)) > 2


def test_figures_of_other_first_calls_stay(modules):
    rows = [{"op": "a", "case": name, "first_call_s": seconds} for name, seconds in (("M", 1.0), ("N", 2.0), ("M", 3.0))]
    assert modules("first_calls").merged(rows[:2], rows[2:]) == [rows[2], rows[1]]
