"""Sessions on a real bundle: one layer of every kind, with a window that overflows."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import lively_params
from wm_export import export_bundle
from wm_graph import ModelConfig, save_checkpoint
from wm_graph.errors import CapacityError
from wm_runtimes import Session, Snapshot, open_session
from wm_runtimes.snapshot import Array

CONFIG = ModelConfig(
    name="one-of-each", vocab_size=64, d_model=32, d_ff=48, n_head=4, n_kv_head=2, head_dim=8, ssd_head=2, ssd_head_dim=16, ssd_state=8,
    ssd_group=1, keep_window=6, qk_norm=True, learned_residual=True, n_expert=16, n_retrieval_head=2, n_pick=2, d_retrieval=8,
    layers=(("ssd", "mlp"), ("attention", "cdmoe"), ("dynamic_mask_attention", "mlp")),
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "eager": {"runtime": "eager"},
    "model.ort.onnx": {"graph": "model.ort.onnx"},
    "model.onnx": {"graph": "model.onnx"},
}
B, T, CAPACITY = 3, 17, 24
TOKENS_BT = np.random.default_rng(5).integers(0, 64, (B, T))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder / "checkpoint", CONFIG, lively_params(CONFIG, seed=3))
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(params=CASES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    case: dict[str, Any] = CASES[request.param]
    return case


@pytest.fixture
def session(bundle: Path, options: dict[str, Any]) -> Session:
    return open_session(bundle, batch=B, capacity=CAPACITY, **options)


def close_to(got: Array, expected: Array) -> None:
    """Equal up to float32 rounding in another order of summation."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * float(np.abs(expected).max()) + 1e-6)


def every(length: int, rows: int = B) -> Array:
    return np.tile(np.arange(length), (rows, 1))


def test_the_model_ranks_its_window_by_score(session: Session) -> None:
    logits = session.prefill(TOKENS_BT, select=every(T))
    assert 0.3 < logits.std() < 3
    (position_BKW,) = (leaf for name, leaf in session.snapshot().leaves.items() if name.endswith("slot_position"))
    latest = np.arange(T - CONFIG.keep_window, T)
    assert (np.sort(position_BKW, -1) != latest).any(-1).all()


@pytest.mark.parametrize("edges", [[0, 16, 17], [0, 1, 2, 17], [0, 5, 9, 16, 17], list(range(18))])
def test_any_split_of_a_prompt_gives_the_same_logits(session: Session, edges: list[int]) -> None:
    whole = session.prefill(TOKENS_BT, select=every(T))
    session.reset()
    parts = [session.prefill(TOKENS_BT[:, i:j], select=every(j - i)) for i, j in itertools.pairwise(edges)]
    close_to(np.concatenate(parts, axis=1), whole)


def test_ragged_rows_equal_each_row_alone(session: Session, bundle: Path, options: dict[str, Any]) -> None:
    valid = [17, 4, 9]
    together = session.prefill(TOKENS_BT, valid)
    steps = [session.decode(TOKENS_BT[:, t])[:, None] for t in range(4)]
    for row in range(B):
        alone = open_session(bundle, batch=1, capacity=CAPACITY, **options)
        close_to(together[row], alone.prefill(TOKENS_BT[row, : valid[row]])[0])
        for t, step in enumerate(steps):
            close_to(step[row], alone.decode(TOKENS_BT[row : row + 1, t]))


@pytest.mark.parametrize("rows", [[1], [0, 1], [2, 0]])
def test_a_subset_of_rows_leaves_the_others_bitwise_unchanged(session: Session, rows: list[int]) -> None:
    session.prefill(TOKENS_BT[:, :7])
    before = session.snapshot()
    full = session.prefill(TOKENS_BT[:, 7:12])
    session.restore(before)
    close_to(session.prefill(TOKENS_BT[rows, 7:12], rows=rows), full[rows])
    after = session.snapshot()
    others = [row for row in range(B) if row not in rows]
    for name, array in before.leaves.items():
        np.testing.assert_array_equal(after.leaves[name][others], array[others], err_msg=name)
    assert (after.position_B[others] == 7).all()


def test_writing_in_place_equals_the_copying_path_bitwise(bundle: Path) -> None:
    in_place, copying = (open_session(bundle, batch=B, capacity=CAPACITY, alias=alias) for alias in (True, False))
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 12), (12, 17)):
        np.testing.assert_array_equal(in_place.prefill(TOKENS_BT[:, start:end]), copying.prefill(TOKENS_BT[:, start:end]))
    one, other = in_place.snapshot(), copying.snapshot()
    for name, array in one.leaves.items():
        np.testing.assert_array_equal(other.leaves[name], array, err_msg=name)


def test_a_snapshot_restores_exactly_in_memory_and_through_a_file(session: Session, tmp_path: Path) -> None:
    session.prefill(TOKENS_BT[:, :9])
    saved = session.snapshot()
    saved.save(tmp_path / "state")
    expected = session.prefill(TOKENS_BT[:, 9:14])
    for snapshot in (saved, Snapshot.load(tmp_path / "state")):
        session.restore(snapshot)
        np.testing.assert_array_equal(session.prefill(TOKENS_BT[:, 9:14]), expected)


def test_a_snapshot_moves_to_another_runtime(bundle: Path) -> None:
    eager, onnx = open_session(bundle, "eager", batch=B, capacity=CAPACITY), open_session(bundle, batch=B, capacity=CAPACITY)
    eager.prefill(TOKENS_BT[:, :9])
    onnx.restore(eager.snapshot())
    close_to(onnx.prefill(TOKENS_BT[:, 9:]), eager.prefill(TOKENS_BT[:, 9:]))


def test_permuted_rows_go_on_as_the_rows_they_were(session: Session) -> None:
    session.prefill(TOKENS_BT[:, :9], valid=[9, 3, 6])
    saved = session.snapshot()
    expected = session.decode([1, 2, 3])
    session.restore(saved)
    session.permute([2, 0, 0])
    assert session.position.tolist() == [6, 9, 9]
    close_to(session.decode([3, 1, 1]), expected[[2, 0, 0]])


def test_a_reset_row_starts_anew(session: Session) -> None:
    first = session.prefill(TOKENS_BT[:, :9])
    session.reset([1])
    close_to(session.prefill(TOKENS_BT[1:2, :9], rows=[1]), first[1:2])


def test_rows_fill_to_the_capacity_and_not_beyond(session: Session) -> None:
    session.prefill(TOKENS_BT, valid=[17, 8, 8])
    session.prefill(TOKENS_BT[:, :16], valid=[7, 16, 3])
    before = session.snapshot()
    with pytest.raises(CapacityError, match="row 0 holds 24"):
        session.decode([1, 1, 1])
    after = session.snapshot()
    for name, array in before.leaves.items():
        np.testing.assert_array_equal(after.leaves[name], array, err_msg=name)
    assert session.position.tolist() == [24, 24, 11]


def test_greedy_text_of_a_batch_equals_each_prompt_alone(session: Session, bundle: Path, options: dict[str, Any]) -> None:
    prompts = [TOKENS_BT[0, :9].tolist(), TOKENS_BT[1, :2].tolist(), TOKENS_BT[2, :5].tolist()]
    together = session.generate(prompts, 12, chunk=4)
    alone = open_session(bundle, capacity=CAPACITY, **options)
    assert together == [alone.generate([prompt], 12)[0] for prompt in prompts]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_compiled_agrees_with_eager_and_makes_two_graphs(bundle: Path) -> None:
    from torch._dynamo.utils import counters

    made = counters["stats"]["unique_graphs"]
    eager, compiled = (open_session(bundle, runtime, batch=B, capacity=CAPACITY) for runtime in ("eager", "compiled"))
    for arguments in (
        {"tokens": TOKENS_BT[:, :5], "valid": [5, 2, 3]},
        {"tokens": TOKENS_BT[:, 5:6]},
        {"tokens": TOKENS_BT[:2, 6:10], "rows": [1, 2]},
        {"tokens": TOKENS_BT[:2, 10:12], "rows": [2, 0], "select": every(2, 2)},
        {"tokens": TOKENS_BT[:1, 12:15], "rows": [1]},
        {"tokens": TOKENS_BT[:1, 15:16], "rows": [0], "select": [[0, 0]]},
    ):
        close_to(compiled.prefill(**arguments), eager.prefill(**arguments))
    assert compiled.position.tolist() == eager.position.tolist()
    assert counters["stats"]["unique_graphs"] - made == 2
