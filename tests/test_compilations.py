"""How often lengths make anything compile: over 64 of them, each kernel twice at most, and torch.compile has two graphs of an op.

A kernel is a function of Triton and the part of the work that a constant tells it to do. What an op launches may be another for one token,
for some and for many (`regime` in its plan.py), but no kernel among them is compiled anew for other lengths more than once.
"""

from collections import defaultdict
from importlib.util import find_spec

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fake_cuda import fake_h100, launch
from native_cases import UNSCALED, use_with
from native_gpu import values_of
from wm_kernels.native import shape_of
from wm_kernels.native_ops import OPS

triton_needed = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

# All small lengths, those around powers of two, a prime.
LENGTHS = sorted({*range(1, 34), *(2**n + off for n in range(6, 16) for off in (-1, 0, 1)), 65521})
HEADS = {"H": 16, "K": 4, "P": 64}
SCAN = {"H": 16, "P": 64, "G": 4, "N": 64}
SLOTS = ("slot_k_BKWP", "slot_v_BKWP", "slot_score_BKW", "slot_position_BKW", "position_B")
SCORES = ("cache_k_BKSP", "cache_v_BKSP", "cache_score_BAS", "position_B")
MIX = {"activation": "silu", "weight_inside": False}
MOE = {"k": 2, "D": 1024, "E": 8, "I": 512, "F": 1024}, {"activation": "silu", "gated": True}, ("in_bias_EF", "out_bias_ED")
ADDED = {"scoring": "additive", "ratio": 0.0}
# name: sizes, plain arguments, absent inputs
CASES = {
    "residual_rms_norm": ({"D": 1024}, {"eps": 1e-6}, ()),
    "gated_rms_norm": ({"C": 2048}, {"eps": 1e-6}, ()),
    "rope": ({"H": 16, "P": 64, "F": 32}, {}, ()),
    "rope_angles": ({}, {"pairs": 64, "theta": 1e4} | UNSCALED, ("length_B",)),
    "causal_conv1d": ({"C": 4352, "L": 4, "Y": 3}, {"activation": "silu"}, ()),
    "router_topk": ({"E": 64}, {"k": 8, "normalize": True}, ()),
    "product_key_topk": ({"R": 4, "d": 64, "J": 64}, {"k": 8}, ()),
    "expert_mix": ({"R": 4, "k": 8, "D": 2048, "E": 16384}, MIX, ()),
    "expert_mix of few experts": ({"R": 4, "k": 16, "D": 2048, "E": 1024}, MIX, ()),
    "moe_mix": MOE,
    "linear": ({"K": 1024, "N": 3080}, {"A": 1024, "B": 1024, "C": 1024, "H": 8, "gated": False}, ("bias_N",)),
    "linear gated": ({"K": 1024, "N": 8192}, {"A": 4096, "B": 0, "C": 0, "H": 0, "gated": True}, ("step_bias_H",)),
    "selective_scan": ({"C": 2048, "N": 16}, {}, ()),
    "selective_scan from zero": ({"C": 2048, "N": 16}, {}, ("state_BCN",)),
    "ssd_scan": (SCAN, {}, ()),
    "ssd_scan from zero": ({**SCAN, "H": 24}, {}, ("state_BHNP",)),
    "ssd_scan_rope": ({**SCAN, "F": 32}, {}, ()),
    "attention": ({"S": 70000, **HEADS}, {}, ()),
    "attention_rope": ({"S": 70000, "C": 1536, "F": 32, **HEADS}, {"n_head": 16, "n_kv_head": 4, "head_dim": 64}, ()),
    "scored_attention": ({"S": 70000, "A": 4, **HEADS}, ADDED, ()),
    "scored_attention without a cache": ({"A": 4, **HEADS}, ADDED, SCORES),
    "keep_window_attention": ({"W": 2048, **HEADS}, {"window": 2048}, ()),
    "keep_window_attention without slots": (HEADS, {"window": 2048}, SLOTS),
}


def specialisation(launch):
    """What Triton compiles a kernel for: constants, options, and of every integer that is not exempt, whether 1 or divisible by 16."""
    kernel = launch.kernel
    exempt = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
    runtime = [name for name in kernel.arg_names if name not in launch.constants]
    of = []
    for name, value in zip(runtime, launch.arguments, strict=True):
        if isinstance(value, int):
            free = name in (exempt or ())
            of.append((name, value > 2**31 - 1, not free and value == 1, not free and value % 16 == 0))
    return kernel.fn.__name__, tuple(launch.constants.items()), tuple(launch.options.items()), tuple(of)


def kernel_of(launch):
    return launch.kernel.fn.__name__, launch.constants.get("START"), launch.constants.get("PART")


@triton_needed
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in CASES), ("moe_mix", torch.float16)], ids=str)
def test_each_kernel_is_compiled_at_most_twice_over_64_lengths(name, dtype, B):
    assert len(LENGTHS) == 64
    op, (sizes, plain, absent) = name.split()[0], CASES[name]
    use, form = use_with(op, dtype, sizes, plain, absent), getattr(torch.ops.wm, op).default
    with fake_h100() as plans:
        for T in LENGTHS:
            every = {**sizes, **plain, "B": B, "T": T, "M": T}
            given = {name: torch.empty(shape_of(name, every), dtype=kind, device="cuda") for name, kind in use.dtypes} | plain
            launch(form, tuple(given.get(argument.name) for argument in form._schema.arguments))
    compiled = defaultdict(set)
    for item in (item for plan in plans for item in plan.launches):
        compiled[kernel_of(item)].add(specialisation(item))
    assert compiled
    assert not {kernel: len(kinds) for kernel, kinds in compiled.items() if len(kinds) > 2}


# Of another size than any below: torch.compile takes two sizes that are equal at first for one.
GRAPHED = sorted({*range(1, 58), 61, 67, 71, 79, 83, 89, 97}, reverse=True)
SMALL = {
    "H": 4, "K": 2, "P": 8, "G": 2, "N": 6, "A": 2, "W": 7, "S": 200, "D": 16, "E": 9, "I": 5, "F": 3, "R": 2, "J": 8, "d": 4, "L": 3,
    "Y": 2, "C": 12, "k": 2,
}  # fmt: skip
SMALLER = {"linear": {"K": 8, "N": 12}, "moe_mix": {"F": 10}, "attention_rope": {"C": 64}}
ARGUMENTS = {
    "attention_rope": {"n_head": 4, "n_kv_head": 2, "head_dim": 8}, "product_key_topk": {"k": 3}, "router_topk": {"k": 3},
    "linear": {"A": 6, "B": 3, "C": 2, "H": 1}, "linear gated": {"A": 6},
}  # fmt: skip


def small_call(name, T):
    """Arguments on the CPU."""
    op, (_, plain, absent) = name.split()[0], CASES[name]
    plain = plain | ARGUMENTS.get(name, ARGUMENTS.get(op, {})) | ({"window": 7} if "window" in plain else {})
    sizes = {**SMALL, **SMALLER.get(op, {}), **plain, "B": 2, "T": T, "M": T}
    given = values_of(use_with(op, torch.float32, sizes, plain, absent), sizes, T, "cpu") | plain
    return tuple(given.get(argument.name) for argument in getattr(torch.ops.wm, op).default._schema.arguments)


def test_every_op_is_among_those_counted():
    assert {name.split()[0] for name in CASES} == set(OPS)


@triton_needed
@pytest.mark.parametrize("name", CASES)
def test_torch_compile_has_at_most_two_graphs_of_an_op_over_64_lengths(name):
    """One of a single token, one of all other lengths."""
    assert len(GRAPHED) == 64
    form, counter = getattr(torch.ops.wm, name.split()[0]).default, CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: form(*arguments), backend=counter, dynamic=True, fullgraph=True)
    for T in GRAPHED:
        compiled(*small_call(name, T))
    assert 1 <= counter.frame_count <= 2
