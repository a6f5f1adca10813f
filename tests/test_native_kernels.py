"""libwm_kernels through its Python binding, against the double of the CUDA driver in a process of its own; `make cpp` builds both."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_graph.errors import BundleError, InputError, RuntimeUnavailableError
from wm_runtimes.native_kernels import NativeKernels, find_library

CPP = Path(__file__).parents[1] / "runtimes" / "cpp"
GOLDEN = CPP / "tests" / "golden"
INT64 = range(-(2**63), 2**63)
KERNEL = "probe-0123456789abcdef"
ZEROS = "0" * 64


def _double() -> Path:
    try:
        return find_library().parent / "double" / "libcuda.so.1"
    except RuntimeUnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def ask() -> Iterator[Callable[[Any], Any]]:
    """Sends a request to native_kernels_worker.py and returns its answer."""
    command = [sys.executable, str(Path(__file__).with_name("native_kernels_worker.py")), str(_double())]
    root = Path(__file__).parents[1]
    paths = ":".join(str(root / name) for name in (".", "kernels", "export", "runtimes"))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, back = process.stdin, process.stdout

        def request(value: Any) -> Any:
            to.write(json.dumps(value) + "\n")
            to.flush()
            return json.loads(back.readline())

        yield request
        to.close()


def _write(folder: Path, expressions: list[Any], symbols: dict[str, int]) -> None:
    """Plans of an op `wm::probe` whose one kernel takes the expressions as 64-bit integers; its input's shape binds the symbols."""
    cubin = f"cubin probe {'8 ' * (len(expressions) + 2)}\n".encode()
    (folder / "sm_90").mkdir(exist_ok=True)
    (folder / "sm_90" / f"{KERNEL}.cubin").write_bytes(cubin)
    file: dict[str, Any] = {"file": f"sm_90/{KERNEL}.cubin", "sha256": hashlib.sha256(cubin).hexdigest(), "size": len(cubin)}
    names = list(symbols)
    entry = {
        "op": "wm::probe", "key": {}, "onnx": None, "dtypes": {"x": "uint8"}, "symbols": names, "absent": [],
        "inputs": [{"name": "x", "shape": [0, *names], "optional": False}],
        "outputs": [{"name": "y", "dtype": "uint8", "shape": [0], "alias": None}],
        "variants": [{"architectures": ["sm_90"], "when": [], "scratch": [],
                      "launches": [{"kernel": KERNEL, "grid": [1, 1, 1], "arguments": expressions}]}],
    }  # fmt: skip
    kernel = {
        "name": "probe",
        "parameters": ["i64"] * len(expressions),
        "dependent": False,
        "files": {"sm_90": file | {"shared": 0, "warps": 1, "registers": 8}},
    }
    plans = {"schema": 2, "triton": "3.6.0", "architectures": ["sm_90"], "kernels": {KERNEL: kernel}, "ops": [entry], "digest": ZEROS}
    text = json.dumps(plans, sort_keys=True)
    (folder / "plans.json").write_text(text.replace(ZEROS, hashlib.sha256(text.encode()).hexdigest(), 1))


def _value(expression: Any, symbols: dict[str, int]) -> int:
    """The expression in Python's integers; OverflowError where a step leaves int64."""
    if not isinstance(expression, list):
        return symbols[expression] if isinstance(expression, str) else expression
    name, first, *rest = expression
    total = _value(first, symbols)
    if name == "pow2":
        total = 1 << max(0, total - 1).bit_length()
    for operand in rest:
        other = _value(operand, symbols)
        steps = {"+": int.__add__, "*": int.__mul__, "-": int.__sub__, "//": int.__floordiv__, "%": int.__mod__, "min": min, "max": max}
        total = steps[name](total, other)
        if total not in INT64:
            raise OverflowError
    if total not in INT64:
        raise OverflowError
    return total


SYMBOLS = ("B", "T", "S")
INTEGERS = st.one_of(st.integers(-20, 20), st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63), -(2**31)]), st.integers(-(2**63), 2**63 - 1))
LEAVES = INTEGERS | st.sampled_from(SYMBOLS)


def _joined(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    many = st.tuples(st.sampled_from(["+", "*", "min", "max"]), st.lists(children, min_size=2, max_size=4))
    two = st.tuples(st.sampled_from(["-", "//", "%"]), st.lists(children, min_size=2, max_size=2))
    one = st.tuples(st.just("pow2"), st.lists(children, min_size=1, max_size=1))
    return (many | two | one).map(lambda made: [made[0], *made[1]])


EXPRESSIONS = st.recursive(LEAVES, _joined, max_leaves=12)


@settings(max_examples=200)
@given(
    expression=EXPRESSIONS,
    symbols=st.fixed_dictionaries({name: st.integers(0, 40) | st.sampled_from([2**31 - 1, 4096, 65536]) for name in SYMBOLS}),
)
def test_an_expression_is_its_exact_integer_or_refused_where_int64_overflows(
    ask: Callable[[Any], Any], tmp_path_factory: pytest.TempPathFactory, expression: Any, symbols: dict[str, int]
) -> None:
    folder = tmp_path_factory.mktemp("plans")
    _write(folder, [expression, 5], symbols)
    answer = ask({"folder": str(folder), "op": "wm::probe", "arguments": {}, "inputs": [["uint8", [0, *symbols.values()], 0]]})
    try:
        expected = _value(expression, symbols)
    except (OverflowError, ZeroDivisionError):
        assert answer["error"] == "InputError"
        assert "\n" not in answer["line"]
        assert answer["launches"] == []
    else:
        assert "error" not in answer, answer
        assert answer["launches"][0]["values"] == [expected % 2**64, 5, 0, 0]


def test_a_call_reaches_the_driver_as_the_plan_says(ask: Callable[[Any], Any]) -> None:
    B, T = 3, 100
    inputs = [
        ["bfloat16", [B, T, 2, 16], 1 << 40],
        ["float32", [B, T, 2], 2 << 40],
        ["float32", [B, 2, 8, 16], 3 << 40],
        ["int64", [B], 4 << 40],
    ]
    answer = ask({"folder": str(GOLDEN), "op": "wm::scan", "arguments": {"groups": 1, "activation": "silu"}, "inputs": inputs})
    assert answer["layouts"] == [["bfloat16", [B, T, 2, 16]], ["float32", [B, 2, 8, 16]]]
    assert answer["scratch"] == 256 + B * 2 * 128 * 4
    assert [launch["name"] for launch in answer["launches"]] == ["prepare", "sweep"]
    assert answer["launches"][0]["grid"] == [B * 2, 1, 1]
    assert answer["launches"][0]["values"] == [2 << 40, (1 << 50) + 256, 4 << 40, T, 16 * B, 0, 0]
    assert answer["launches"][1]["stream"] == 7
    assert [launch["programmatic"] for launch in answer["launches"]] == [0, 1]


def test_a_float_argument_selects_by_its_repr(ask: Callable[[Any], Any]) -> None:
    request = {"folder": str(GOLDEN), "op": "wm::norm", "inputs": [["float32", [2, 64], 1 << 40], ["float32", [64], 2 << 40]]}
    assert "error" not in ask(request | {"arguments": {"eps": 1e-6}})
    refused = ask(request | {"arguments": {"eps": 1e-5}})
    assert refused["error"] == "InputError"
    assert "1e-06" in refused["line"]


def test_damaged_plans_are_a_bundle_error_of_one_line(tmp_path: Path) -> None:
    _double()
    (tmp_path / "plans.json").write_text((GOLDEN / "plans.json").read_text().replace("sm_90", "sm_91", 1))
    with pytest.raises(BundleError, match=r"digest was made of.*again$"):
        NativeKernels(tmp_path)


def test_opening_finding_and_verifying_need_no_cuda() -> None:
    _double()
    with NativeKernels(GOLDEN) as kernels:
        kernels.verify()
        with pytest.raises(InputError, match='no op "wm::nothing"'):
            kernels.op("wm::nothing", {}, ["float32"])


def test_without_the_library_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WM_KERNELS_LIBRARY", "/nowhere/libwm_kernels.so")
    with pytest.raises(RuntimeUnavailableError, match="make cpp"):
        NativeKernels(GOLDEN)
