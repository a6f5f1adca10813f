"""Sessions on the toy bundle, whose numbers are exact, so that equal means equal bits."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy_bundle import VOCAB, assert_same_state, make_toy_bundle, state_of
from wm_graph.errors import BundleError, CapacityError, InputError, RuntimeUnavailableError
from wm_runtimes import RUNTIMES, Session, Snapshot, availability, open_bundle, open_session

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def session(toy: Path) -> Session:
    return open_session(toy, batch=3, capacity=12)


# What calls mean


@given(cuts=st.lists(st.integers(1, 9), max_size=5))
def test_any_split_of_a_prompt_gives_the_same_logits_and_state(toy: Path, cuts: list[int]) -> None:
    tokens_BT = np.random.default_rng(1).integers(0, VOCAB, (2, 10))
    whole, pieces = open_session(toy, batch=2, capacity=10), open_session(toy, batch=2, capacity=10)
    expected = whole.prefill(tokens_BT, select=np.tile(np.arange(10), (2, 1)))
    edges = sorted({0, *cuts, 10})
    parts = [pieces.prefill(tokens_BT[:, start:end], select=np.tile(np.arange(end - start), (2, 1))) for start, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    assert_same_state(pieces, state_of(whole))


def test_decode_is_prefill_of_one_token(toy: Path) -> None:
    one, other = open_session(toy, batch=2), open_session(toy, batch=2)
    for tokens_B in ([3, 4], [15, 0], [7, 7]):
        np.testing.assert_array_equal(one.decode(tokens_B), other.prefill(np.array(tokens_B)[:, None])[:, 0])
    assert_same_state(one, state_of(other))


def test_ragged_rows_equal_each_row_alone(session: Session, toy: Path) -> None:
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
    padded = np.full((3, 5), -99)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    together = session.prefill(padded, [5, 1, 3])
    for row, prompt in enumerate(prompts):
        alone = open_session(toy, capacity=12)
        np.testing.assert_array_equal(alone.prefill(prompt), together[row : row + 1])
        np.testing.assert_array_equal(alone.decode([2]), session.decode([2], rows=[row]))
    assert session.position.tolist() == [6, 2, 4]


def test_a_row_with_no_valid_token_gets_zeros_and_stays_as_it_was(session: Session) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    before = session.snapshot()
    logits_BSV = session.prefill([[1, 2], [9, 9], [5, 6]], valid=[2, 0, 1])
    assert not logits_BSV[1].any()
    assert session.position.tolist() == [4, 2, 3]
    np.testing.assert_array_equal(session.snapshot().leaves["layers.0.ssd"][1], before.leaves["layers.0.ssd"][1])
    assert not session.prefill(np.zeros((3, 0), int)).any()
    assert session.position.tolist() == [4, 2, 3]


@pytest.mark.parametrize("rows", [[0], [1, 2], [2, 0], [0, 2], [2, 1, 0]])
def test_a_subset_of_rows_equals_those_rows_and_leaves_the_others_untouched(session: Session, toy: Path, rows: list[int]) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    alone = open_session(toy, batch=3, capacity=12)
    alone.restore(session.snapshot())
    before = state_of(session)
    tokens = RNG.integers(0, VOCAB, (3, 4))
    expected = alone.prefill(tokens)
    np.testing.assert_array_equal(session.prefill(tokens[rows], rows=rows), expected[rows])
    np.testing.assert_array_equal(session.decode(tokens[rows, 0], rows=rows), alone.decode(tokens[:, 0])[rows])
    others = [row for row in range(3) if row not in rows]
    after, full = state_of(session), state_of(alone)
    for name in before:
        np.testing.assert_array_equal(after[name][others], before[name][others], err_msg=name)
        np.testing.assert_array_equal(after[name][rows], full[name][rows], err_msg=name)


def test_select_takes_token_0_of_a_row_without_tokens_and_gives_zeros(session: Session) -> None:
    logits_BSV = session.prefill(np.ones((3, 2), int), valid=[2, 0, 1], select=[[1], [0], [0]])
    assert not logits_BSV[1].any()
    assert logits_BSV[0].any()
    assert session.position.tolist() == [2, 0, 1]


def test_select_names_the_tokens_whose_logits_come(session: Session) -> None:
    before = session.snapshot()
    every = session.prefill(np.arange(12).reshape(3, 4), select=np.tile(np.arange(4), (3, 1)))
    session.restore(before)
    picked = session.prefill(np.arange(12).reshape(3, 4), select=[[3, 0], [1, 1], [2, 3]])
    np.testing.assert_array_equal(picked, np.take_along_axis(every, np.array([[3, 0], [1, 1], [2, 3]])[..., None], axis=1))
    assert picked.dtype == np.float32


def test_writing_in_place_equals_the_copying_path(toy: Path) -> None:
    in_place, copying = open_session(toy, batch=2, capacity=64), open_session(toy, batch=2, capacity=64, alias=False)
    for length in (7, 1, 1, 3, 1, 20):
        tokens = RNG.integers(0, VOCAB, (2, length))
        np.testing.assert_array_equal(in_place.prefill(tokens), copying.prefill(tokens))
        assert_same_state(copying, state_of(in_place))


def test_both_graphs_of_a_bundle_run(toy: Path) -> None:
    results = [open_session(toy, graph=graph, threads=1, prepack=True).prefill([1, 2, 3]) for graph in ("model.onnx", "model.ort.onnx")]
    np.testing.assert_array_equal(*results)


# Capacity


def test_a_row_may_be_filled_to_the_last_cell_whatever_the_padding_of_the_others(toy: Path) -> None:
    session = open_session(toy, batch=3, capacity=8)
    session.prefill(np.ones((1, 6), int), rows=[1])
    tokens = RNG.integers(0, VOCAB, (3, 7))
    logits_BSV = session.prefill(tokens, valid=[7, 2, 3])
    assert session.position.tolist() == [7, 8, 3]
    alone = open_session(toy, batch=1, capacity=8)
    alone.prefill(np.ones((1, 6), int))
    np.testing.assert_array_equal(logits_BSV[1], alone.prefill(tokens[1:2, :2])[0])
    fresh = open_session(toy, batch=1, capacity=8)
    np.testing.assert_array_equal(logits_BSV[2], fresh.prefill(tokens[2:3, :3])[0])
    session.prefill(tokens[:, :5], valid=[1, 0, 5])
    assert session.position.tolist() == [8, 8, 8]


def test_more_than_the_capacity_is_refused_and_the_state_unchanged(session: Session) -> None:
    session.prefill(np.ones((3, 10), int), valid=[10, 3, 4])
    before = state_of(session)
    with pytest.raises(CapacityError, match=r"row 0 holds 10 tokens, 3 more exceed the capacity 12"):
        session.prefill(np.ones((3, 3), int))
    session.decode([1, 1], rows=[0, 1])
    session.decode([1], rows=[0])
    filled = state_of(session)
    with pytest.raises(CapacityError, match="row 0 holds 12"):
        session.decode([1, 1, 1])
    assert_same_state(session, filled)
    assert before["position"].tolist() == [10, 3, 4]


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"batch": 1.5}, {"capacity": 0}, {"capacity": 4097}, {"batch": True}])
def test_sizes_out_of_range_are_refused(toy: Path, sizes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(sizes))):
        open_session(toy, **sizes)


# Input


BAD_PREFILLS = {
    "id below 0": ({"tokens": [[1, -1], [1, 1], [1, 1]]}, r"id -1 in row 0 at index 1 is outside 0\.\.15"),
    "id too large": ({"tokens": [[1, 1], [1, 1], [16, 1]]}, r"id 16 in row 2 at index 0"),
    "id beyond int64": ({"tokens": np.full((3, 1), 2**64 - 1, np.uint64)}, "id 18446744073709551615"),
    "floats": ({"tokens": np.ones((3, 2))}, "dtype float64"),
    "booleans": ({"tokens": np.ones((3, 2), bool)}, "dtype bool"),
    "strings": ({"tokens": [["a"], ["b"], ["c"]]}, "dtype"),
    "ragged": ({"tokens": [[1], [1, 2], [3]]}, "rectangular"),
    "too few rows": ({"tokens": [[1], [2]]}, r"shape \[2, 1\], expected \[3, T\]"),
    "one dimension": ({"tokens": [1, 2, 3]}, r"expected \[3, T\]"),
    "three dimensions": ({"tokens": np.ones((3, 1, 1), int)}, r"expected \[3, T\]"),
    "valid too long": ({"tokens": np.ones((3, 2), int), "valid": [1, 3, 1]}, r"valid: 3 in row 1 is outside 0\.\.2"),
    "valid negative": ({"tokens": np.ones((3, 2), int), "valid": [1, 1, -1]}, "valid: -1 in row 2"),
    "valid misshapen": ({"tokens": np.ones((3, 2), int), "valid": [[1], [1], [1]]}, r"expected \[3\]"),
    "valid of floats": ({"tokens": np.ones((3, 2), int), "valid": [1.0, 1.0, 1.0]}, "dtype float64"),
    "row out of range": ({"tokens": [[1]], "rows": [3]}, r"rows: 3 is outside 0\.\.2"),
    "row negative": ({"tokens": [[1]], "rows": [-1]}, "rows: -1"),
    "row twice": ({"tokens": [[1], [1]], "rows": [1, 1]}, "twice"),
    "no row": ({"tokens": np.ones((0, 1), int), "rows": []}, "at least one"),
    "select past valid": ({"tokens": np.ones((3, 2), int), "valid": [2, 1, 2], "select": [[0], [1], [0]]}, "index 1 in row 1, which has 1"),
    "select negative": ({"tokens": np.ones((3, 2), int), "select": [[0], [0], [-1]]}, "index -1 in row 2"),
    "select empty": ({"tokens": np.ones((3, 2), int), "select": np.ones((3, 0), int)}, "S of at least 1"),
}


@pytest.mark.parametrize("case", BAD_PREFILLS)
def test_bad_input_is_refused_by_name_and_the_state_unchanged(session: Session, case: str) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    before = state_of(session)
    arguments, message = BAD_PREFILLS[case]
    with pytest.raises(InputError, match=message):
        session.prefill(**arguments)
    assert_same_state(session, before)


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [1, 2], [1, 2]], [1, 2, 99], 5])
def test_bad_decode_input_is_refused(session: Session, tokens: Any) -> None:
    with pytest.raises(InputError):
        session.decode(tokens)
    assert session.position.tolist() == [0, 0, 0]


# Snapshots, resets, permutations


def test_a_snapshot_restores_exactly_and_does_not_follow_the_session(session: Session) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    saved = session.snapshot()
    first = session.decode([7, 8, 9])
    session.prefill(np.ones((3, 5), int))
    session.restore(saved)
    assert session.position.tolist() == [2, 2, 2]
    np.testing.assert_array_equal(session.decode([7, 8, 9]), first)


def test_a_snapshot_survives_a_file_and_another_session(session: Session, toy: Path, tmp_path: Path) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]], valid=[2, 1, 2])
    session.snapshot().save(tmp_path / "state.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    other = open_session(toy, batch=3, capacity=12)
    other.restore(Snapshot.load(tmp_path / "state.safetensors"))
    assert_same_state(other, state_of(session))
    np.testing.assert_array_equal(other.decode([7, 8, 9]), session.decode([7, 8, 9]))


def test_a_foreign_or_damaged_snapshot_is_refused_and_the_state_unchanged(session: Session, toy: Path, tmp_path: Path) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    before = state_of(session)
    other = make_toy_bundle(tmp_path / "other", dtype="float16")
    saved = session.snapshot()
    broken = Snapshot(saved.fingerprint, saved.name, 3, 12, saved.position_B, {})
    beyond = Snapshot(saved.fingerprint, saved.name, 3, 12, saved.position_B + 100, saved.leaves)
    for snapshot, message in (
        (open_session(other, batch=3, capacity=12).snapshot(), "another model"),
        (open_session(toy, batch=2, capacity=12).snapshot(), "batch 2"),
        (open_session(toy, batch=3, capacity=13).snapshot(), "capacity 13"),
        (broken, "damaged"),
        (beyond, "outside 0..12"),
    ):
        with pytest.raises(InputError, match=message):
            session.restore(snapshot)
    assert_same_state(session, before)


def test_a_file_that_is_no_snapshot_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    for path, message in (
        (tmp_path / "none", "not a readable"),
        (tmp_path / "short", "not a readable"),
        (toy / "model.safetensors", "no snap"),
    ):
        with pytest.raises(InputError, match=message):
            Snapshot.load(path)


def test_reset_empties_the_named_rows_only(session: Session, toy: Path) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    before = state_of(session)
    session.reset([1])
    after, empty = state_of(session), state_of(open_session(toy, batch=3, capacity=12))
    for name in before:
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
        np.testing.assert_array_equal(after[name][1], empty[name][1])
    session.reset()
    assert_same_state(session, empty)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 2, 2]])
def test_permute_gives_row_i_the_state_of_row_order_i(session: Session, order: list[int]) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]], valid=[1, 2, 2])
    before = state_of(session)
    session.permute(order)
    assert_same_state(session, {name: array[order] for name, array in before.items()})
    reordered = session.decode([7, 7, 7])
    session.reset()
    session.prefill([[1, 2], [3, 4], [5, 6]], valid=[1, 2, 2])
    np.testing.assert_array_equal(reordered, session.decode([7, 7, 7])[order])


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 1, -1], [0.0, 1.0, 2.0]])
def test_a_bad_permutation_is_refused(session: Session, order: list[Any]) -> None:
    with pytest.raises(InputError, match="rows"):
        session.permute(order)


def test_position_is_a_copy(session: Session) -> None:
    session.position[:] = 5
    assert session.position.tolist() == [0, 0, 0]


def test_returned_logits_are_not_overwritten_by_the_next_call(session: Session) -> None:
    first = session.decode([1, 2, 3])
    kept = first.copy()
    session.decode([4, 5, 6])
    np.testing.assert_array_equal(first, kept)


def test_a_closed_session_refuses_every_call(toy: Path) -> None:
    with open_session(toy) as session:
        session.decode([1])
    for call in (lambda: session.decode([1]), session.snapshot, session.reset, session.placement, lambda: session.permute([0])):
        with pytest.raises(InputError, match="closed"):
            call()
    session.close()


def test_a_failed_run_marks_the_state_until_it_is_reset(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = session.snapshot()

    def fail(*_: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_run", fail)
        with pytest.raises(BundleError, match="first line;") as caught:
            session.decode([1, 2, 3])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="undefined"):
        session.decode([1, 2, 3])
    session.restore(saved)
    session.decode([1, 2, 3])


# Opening


def test_running_a_bundle_imports_neither_torch_nor_onnx(toy: Path) -> None:
    program = (
        "import sys; from wm_runtimes import open_session; s = open_session(sys.argv[1], capacity=64);"
        "s.generate([[1, 2]], 4, temperature=1.0, seed=0); s.snapshot();"
        "print([m for m in ('torch', 'onnx', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(toy)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_runtime_or_option_is_refused_with_the_known_ones(toy: Path) -> None:
    with pytest.raises(InputError, match="unknown runtime 'tpu'; choose one of eager, compiled, onnxruntime-cpu"):
        open_session(toy, runtime="tpu")
    with pytest.raises(InputError, match="unknown runtime"):
        availability("tpu")
    with pytest.raises(InputError, match="unknown option 'fast'; it takes graph, threads, prepack, alias, spin"):
        open_session(toy, fast=True)
    for options in ({"graph": "other.onnx"}, {"threads": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            open_session(toy, **options)


def test_availability_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    assert set(RUNTIMES) == {"eager", "compiled", "onnxruntime-cpu", "onnxruntime-cuda"}
    assert availability("onnxruntime-cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "wm-graph\[cpu\]"') as caught:
        open_session(toy)
    assert caught.value.exit_code == 3


def test_a_bfloat16_bundle_is_refused_with_the_reason(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", dtype="bfloat16")
    with pytest.raises(RuntimeUnavailableError, match="bfloat16, which ONNX Runtime's CPU kernels lack; export it as float32 or float16"):
        open_session(bundle)


def test_a_graph_that_does_not_fit_the_manifest_is_refused(toy: Path, tmp_path: Path) -> None:
    state = json.loads((toy / "manifest.json").read_text())["state"]
    renamed = [leaf | ({"name": "layers.9.ssd"} if leaf["kind"] == "ssm" else {}) for leaf in state]
    retyped = [leaf | ({"dtype": "float16"} if leaf["kind"] == "ssm" else {}) for leaf in state]
    for index, (leaves, message) in enumerate(
        [(renamed, "inputs and manifest.json disagree"), (retyped, "float16"), (state[:-1], "disagree")]
    ):
        with pytest.raises(BundleError, match=message):
            open_session(make_toy_bundle(tmp_path / str(index), state=leaves))


def test_placement_names_the_provider_of_every_node(session: Session) -> None:
    placed = session.placement()
    assert list(placed) == ["CPUExecutionProvider"]
    assert all(name.startswith("toy.") for name in placed["CPUExecutionProvider"])


def test_an_opened_bundle_serves_several_sessions(toy: Path) -> None:
    bundle = open_bundle(toy)
    one, two = open_session(bundle), open_session(bundle)
    one.prefill([1, 2, 3])
    assert two.position.tolist() == [0]
