"""Plans as data: for any sizes, what plans.json says is launched is what eager launches."""

import json
import random
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from native_cases import CONFIGURATIONS, declaration, eager_call, tensors_of, use_of
from wm_kernels.native import unspecialized

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
CASES = [(op, index) for op, every in CONFIGURATIONS.items() for index in range(len(every))]
DRAWS = 100
MODULES = {"ssd_scan_rope": "ssd_scan", "scored_attention": "attention"}  # whose launcher an op has
TABLED = ("attention", "keep_window_attention")  # whose plans look up the architecture themselves


@pytest.fixture
def noted(monkeypatch):
    """Notes what eager launches, on whatever architecture it is told to be on."""
    from wm_kernels.attention.plan import planned as attention
    from wm_kernels.keep_window_attention.plan import planned as window

    ran = []

    def listen(op, architecture):
        for cached in (attention, window):
            cached.cache_clear()
        launcher = import_module(f"wm_kernels.{MODULES.get(op, op)}.triton_op")
        monkeypatch.setattr(launcher, "run", lambda plan, tensors: ran.append((plan, tensors)))
        for module in (launcher, *(import_module(f"wm_kernels.{name}.plan") for name in TABLED)):
            monkeypatch.setattr(module, "architecture", lambda device: architecture, raising=False)
        monkeypatch.setattr(launcher, "_known", {}, raising=False)
        return ran

    monkeypatch.setattr(import_module("wm_kernels.expert_mix.triton_op"), "serves_products", lambda *sizes: False)  # another library's
    yield listen
    for cached in (attention, window):
        cached.cache_clear()


def entries_and_plans(op, index, dtype):
    from wm_kernels.native_plans import Plans, document, entries_of, text_of

    entries = entries_of(declaration(op), use_of(op, index, dtype), ARCHITECTURES)
    return entries, Plans(text_of(document(entries, {}, ARCHITECTURES, "3.6.0")))


def drawn(seed, count):
    """Sizes of calls: steps, prompts, rows, from 1 to far, more often small, and those about which plans branch."""
    draw = random.Random(seed)
    for _ in range(count):
        B, T, M, S = (int(2 ** draw.uniform(0, most)) for most in (9, 17, 17, 18))
        near = draw.choice((1, 2, 16, 32, 64, 256, 512, 1024, 4096)) + draw.choice((-1, 0, 1))
        T, M = draw.choice(((T, M), (1, B), (max(1, near), max(1, near))))
        yield {"B": draw.choice((1, B)), "T": T, "M": M, "S": max(S, T)}


def call(plans, use, given, architecture, in_place):
    from wm_kernels.triton_support import dtype_name

    key = {name: repr(value) if isinstance(value, float) else value if isinstance(value, str) else int(value) for name, value in use.plain}
    dtypes, shapes = {name: dtype_name(x.dtype) for name, x in given.items()}, {name: list(x.shape) for name, x in given.items()}
    return plans.call(f"wm::{use.op}", key, dtypes, shapes, architecture, in_place)


def check_same(launches, scratch, kernels, plan, tensors, named):
    assert scratch == {name: wanted.bytes for name, wanted in plan.scratch.items()}
    assert len(launches) == len(plan.launches)
    for ours, theirs in zip(launches, plan.launches, strict=True):
        kernel = kernels[ours.kernel]
        assert kernel.function == (theirs.kernel.fn.__module__, theirs.kernel.fn.__name__)
        told = dict(zip((name for name in theirs.kernel.arg_names if name not in theirs.constants), theirs.arguments, strict=True))
        ones = {name for name, _ in kernel.constants} - set(theirs.constants)  # strides that Triton's launcher would find to be 1
        assert dict(kernel.constants) == {**theirs.constants, **dict.fromkeys(ones, 1)}
        assert all(told[name] in (0, 1) for name in ones)
        assert (kernel.warps, kernel.stages, kernel.max_registers) == (theirs.num_warps, theirs.num_stages, theirs.max_registers)
        assert ours.grid == theirs.blocks
        others = [value for name, value in told.items() if name not in ones]
        for mine, other, kind in zip(ours.arguments, others, kernel.parameters, strict=True):
            if isinstance(other, str):
                assert mine == other if other in plan.scratch else named[mine] is tensors[other], (mine, other)
                dtype = plan.scratch[other].dtype if other in plan.scratch else tensors[other].dtype
                assert kind == f"ptr:{str(dtype).removeprefix('torch.')}:16"
            else:
                assert mine == other or other == 0, (ours, theirs)  # eager writes 0 for the stride of an axis of size 1
                assert -(2**31) <= mine < 2**31 or kind.startswith("i64")
                assert mine % int((*kind.split(":"), 1)[1]) == 0


@pytest.mark.parametrize(("op", "index"), CASES)
def test_no_kernel_is_told_at_run_time_of_a_stride_that_is_always_1(op, index):
    for entry in entries_and_plans(op, index, torch.float16)[0]:
        for _, variant in entry.variants:
            for launch in variant.launches:
                function = getattr(import_module(launch.kernel.function[0]), launch.kernel.function[1])
                names = [name for name in function.arg_names if name not in dict(launch.kernel.constants)]
                told = [name for name, value in zip(names, launch.arguments, strict=True) if value == ("int", 1)]
                assert set(told) <= unspecialized(function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "index"), CASES)
def test_what_the_data_says_is_launched_is_what_eager_launches(op, index, dtype, noted):
    entries, plans = entries_and_plans(op, index, dtype)
    kernels = {launch.kernel.id: launch.kernel for one in entries for _, variant in one.variants for launch in variant.launches}
    for architecture in ARCHITECTURES:
        ran = noted(op, architecture)
        for sizes in drawn(f"{op} {index} {architecture}", DRAWS):
            for entry in entries:
                given = tensors_of(entry.use, sizes)
                ran.clear()
                outputs = eager_call(entry.use, given, entry.in_place)
                named = dict(zip((one.name for one in entry.declared.outputs), outputs, strict=True)) | given
                launches, scratch = call(plans, entry.use, given, architecture, entry.in_place)
                if op == "scored_attention":  # eager's scores are torch's to write
                    assert kernels[launches[0].kernel].function[1] == "write_cells"
                    assert "score_BTA" in launches[0].arguments
                    launches = launches[1:]
                ((plan, tensors),) = ran
                check_same(launches, scratch, kernels, plan, tensors, named)


@pytest.mark.parametrize(("op", "index"), CASES)
def test_exactly_one_variant_of_an_architecture_serves_any_sizes(op, index):
    entries, _ = entries_and_plans(op, index, torch.float16)
    for sizes in drawn(f"{op} {index}", DRAWS):
        for entry in entries:
            for architecture in ARCHITECTURES:
                serving = [variant for served, variant in entry.variants if architecture in served and variant.serves(sizes)]
                assert len(serving) == 1


@pytest.mark.parametrize(("op", "index"), CASES)
def test_plans_are_within_the_limits_of_the_loader_and_hold_no_float(op, index):
    from wm_kernels.native_plans import text_of

    def no_float(text):
        raise AssertionError(f"a float, {text}")

    _, plans = entries_and_plans(op, index, torch.bfloat16)
    json.loads(text_of(plans.data), parse_float=no_float)
    for entry in plans.data["ops"]:
        names = {one["name"] for one in (*entry["inputs"], *entry["outputs"])}
        assert len(names) == len(entry["inputs"]) + len(entry["outputs"])
        assert not names & set(entry["symbols"])
        assert {*entry["absent"]} <= {one["name"] for one in entry["inputs"] if one["optional"]}
        assert len(entry["variants"]) <= 256
        for variant in entry["variants"]:
            scratch = {one["name"] for one in variant["scratch"]}
            assert not scratch & (names | set(entry["symbols"]))
            assert len(variant["when"]) <= 64
            assert len(scratch) <= 64
            assert 1 <= len(variant["launches"]) <= 32
            for launch in variant["launches"]:
                assert len(launch["arguments"]) <= 127
                for value in launch["arguments"]:
                    assert not isinstance(value, str) or value in names | scratch | set(entry["symbols"])


def test_kernels_are_shared_by_all_sizes_of_their_kind():
    entries, _ = entries_and_plans("ssd_scan_rope", 0, torch.bfloat16)
    kernels = {launch.kernel.id: launch.kernel for entry in entries for _, variant in entry.variants for launch in variant.launches}
    assert len(kernels) == len(set(kernels.values())) <= 24


def test_a_plan_that_branches_without_end_is_an_error_that_names_the_op():
    from dataclasses import replace

    from wm_kernels.native import trace
    from wm_kernels.symbolic import TraceError

    def endless(call):
        length = 0
        while length < call.sizes["T"]:
            length += 64
        raise AssertionError("T is not known")

    declared = declaration("rope")
    with pytest.raises(TraceError, match="wm::rope: more than"):
        trace(replace(declared, plan=endless), use_of("rope", 0, torch.bfloat16), "sm_90", False)


def test_damaged_plans_are_refused():
    from wm_kernels.native_plans import Plans, PlansError, text_of

    _, plans = entries_and_plans("rope", 0, torch.bfloat16)
    text = text_of(plans.data)
    assert Plans(text).data == plans.data
    with pytest.raises(PlansError, match="digest"):
        Plans(text.replace('"B"', '"T"', 1))


def test_plans_of_an_older_schema_are_refused_and_say_to_export_again():
    from wm_kernels.native_plans import Plans, PlansError, text_of

    _, plans = entries_and_plans("rope", 0, torch.bfloat16)
    with pytest.raises(PlansError, match=r"^plans\.json: schema 1, expected 2; export it with this version$"):
        Plans(text_of({**plans.data, "schema": 1}))


@pytest.mark.parametrize(
    ("constants", "dependent"),
    [((), False), ((("DEPENDENT", False),), False), ((("DEPENDENT", True),), True), ((("D", 64), ("DEPENDENT", 1)), True)],
)
def test_a_kernel_is_dependent_where_its_constant_says_so(constants, dependent):
    from wm_kernels.native import Kernel

    assert Kernel(("native_kernels", "copy_rows"), (), constants, 4, 1, None).dependent is dependent


@pytest.mark.parametrize("op", sorted(CONFIGURATIONS))
def test_entries_of_an_op_agree_in_which_inputs_are_optional_whatever_its_calls_leave_out(op):
    """ONNX Runtime registers an op once for all of a graph's nodes."""
    found = {
        tuple((one["name"], one["optional"]) for one in entry["inputs"])
        for index in range(len(CONFIGURATIONS[op]))
        for entry in entries_and_plans(op, index, torch.bfloat16)[1].data["ops"]
    }
    assert len(found) == 1
