"""The calls that compute-sanitizer watches: on sm_90 they reach every regime of every op. No GPU is asked; tensors hold nothing."""

import json
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch

import sanitizer_calls
import sanitizer_regimes
import triton_plans
from fake_cuda import fake_h100, launch, plans_of
from wm_kernels import numerics, triton_launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

WITH_REGIME = (
    "residual_rms_norm", "gated_rms_norm", "rope", "causal_conv1d", "router_topk", "product_key_topk", "expert_mix", "selective_scan",
    "ssd_scan", "attention", "keep_window_attention", "linear",
)  # fmt: skip
BY_CONFIGURATION = ("moe_mix", "expert_mix")  # whose plans name the regime where they look up its configuration
TELLING = ("START", "PART", "FINISH", "APART", "SCORING")  # constants by which one kernel does different work


@pytest.fixture
def noted(monkeypatch):
    """(regimes by op, plans) of all calls that are made while this lasts."""
    regimes = set()

    def note(op, name):
        found = getattr(plans_of(op), name)

        def noting(*given):
            regime = found(*given) if name == "regime" else given[3]
            regimes.add((getattr(given[0], "op", op), regime))  # a call of ssd_scan_rope is planned by ssd_scan
            return regime if name == "regime" else found(*given)

        monkeypatch.setattr(plans_of(op), name, noting)

    with fake_h100() as plans:
        for op in WITH_REGIME:
            note(op, "regime")
        for op in BY_CONFIGURATION:
            note(op, "config")
        yield regimes, plans


def make_all(dtype):
    """What sanitizer_calls.py does, on tensors without values."""

    def place(tensor):
        return torch.empty_like(tensor, device="cuda")

    for _, op, call, modes in sanitizer_calls.calls(dtype):
        for mode in modes:
            with numerics(mode):
                launch(op, sanitizer_calls.placed(op, call, dtype, place))
    for _, plan, tensors in sanitizer_regimes.plans(dtype):
        triton_launch.run(plan, {name: place(value) for name, value in tensors.items()})


def regimes_of(op):
    """Those with a row in the op's table, and those that use the row of another."""
    rows = json.loads(files("wm_kernels").joinpath(op, "triton_configs.json").read_text(encoding="utf-8"))
    others = {"attention": {"walk", "chunks"}, "keep_window_attention": {"causal"}}
    return {row["regime"] for row in rows if row.get("arch") != "interpreter"} | others.get(op, set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sanitized_calls_reach_every_regime_and_launch_every_kernel_of_typical_plans(dtype, noted):
    regimes, plans = noted
    make_all(getattr(torch, dtype))
    # Tensor cores have no products of float32: mixtures of many tokens are the reference's.
    tiles = {("moe_mix", "tiles"), ("moe_mix", "thin")} if dtype == "float32" else set()
    assert {(op, regime) for op in (*WITH_REGIME, "ssd_scan_rope", "moe_mix") for regime in regimes_of(op)} - tiles <= regimes
    typical = [plan for make in triton_plans.FUNCTIONS for plan, _ in make(getattr(torch, dtype), "sm_90")]
    missed = {name for name, *_ in variants(typical) - variants(plans)}
    assert not {name for name in missed if not (tiles and name.startswith("moe_"))}


def variants(plans):
    """Kernels, with those constants by which one does different work."""
    launches = [launch for plan in plans for launch in plan.launches]
    return {(launch.kernel.fn.__name__, *(launch.constants.get(name) for name in TELLING), shared(launch)) for launch in launches}


def shared(launch):
    return launch.constants.get("SHARES", 1) > 1
