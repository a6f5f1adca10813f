"""The calls that compute-sanitizer watches: on sm_90 they reach every regime of every op. No GPU is asked; tensors hold nothing."""

import json
import warnings
from importlib import import_module
from importlib.resources import files

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import triton_plans
from triton_support import missing
from wm_kernels import numerics, triton_launch

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

WITH_REGIME = (
    "residual_rms_norm", "gated_rms_norm", "rope", "causal_conv1d", "router_topk", "product_key_topk", "expert_mix", "selective_scan",
    "ssd_scan", "attention", "keep_window_attention",
)  # fmt: skip
BY_CONFIGURATION = ("moe_mix", "expert_mix")  # whose plans name the regime where they look up its configuration
TELLING = ("START", "PART", "FINISH", "APART", "SCORING")  # constants by which one kernel does different work


def plans_of(op):
    return import_module(f"wm_kernels.{op}.plan")


def cleared():
    """No plan is known: each is made anew, for sm_90."""
    triton_launch.architecture.cache_clear()
    for op in (*WITH_REGIME, "moe_mix", "attention_rope"):
        for value in (*vars(plans_of(op)).values(), *vars(import_module(f"wm_kernels.{op}.triton_op")).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
        getattr(import_module(f"wm_kernels.{op}.triton_op"), "_known", {}).clear()


@pytest.fixture
def noted(monkeypatch):
    """(regimes by op, plans) of all calls that are made while this lasts."""
    regimes, plans = set(), []

    def note(op, name):
        found = getattr(plans_of(op), name)

        def noting(*given):
            regime = found(*given) if name == "regime" else given[3]
            regimes.add((getattr(given[0], "op", op), regime))  # a call of ssd_scan_rope is planned by ssd_scan
            return regime if name == "regime" else found(*given)

        monkeypatch.setattr(plans_of(op), name, noting)

    cleared()
    for op in WITH_REGIME:
        note(op, "regime")
    for op in BY_CONFIGURATION:
        note(op, "config")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_launch, "_run_on_cuda", lambda plan, tensors, device: plans.append(plan))
    yield regimes, plans
    cleared()


def make_all(dtype):
    """What sanitizer_calls.py does, on tensors without values."""
    import sanitizer_calls
    import sanitizer_regimes

    def place(tensor):
        return torch.empty_like(tensor, device="cuda")

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for _, op, call, modes in sanitizer_calls.calls(dtype):
            for mode in modes:
                with numerics(mode):
                    launch(op, sanitizer_calls.placed(op, call, dtype, place))
        for _, plan, tensors in sanitizer_regimes.plans(dtype):
            triton_launch.run(plan, {name: place(value) for name, value in tensors.items()})


def launch(op, arguments):
    """The op's CUDA form; where it goes on with torch's own kernels, a torch without CUDA may not know what comes of them."""
    try:
        op._op_dk(torch._C.DispatchKey.CUDA, *arguments)
    except DynamicOutputShapeException:
        pass
    except RuntimeError as error:
        if "not linked with support for cuda" not in str(error):
            raise


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
