"""Sessions on a bundle of every new family: the laws of test_sessions_model.py on states of another kind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import FAMILIES, NEW_FAMILIES
from wm_runtimes import Session, Snapshot, open_session
from wm_runtimes.snapshot import Array

CASES: dict[str, dict[str, Any]] = {
    "eager": {"runtime": "eager"},
    "model.ort.onnx": {"graph": "model.ort.onnx"},
    "model.onnx": {"graph": "model.onnx"},
}
B, T, CAPACITY = 3, 30, 40
TOKENS_BT = np.random.default_rng(5).integers(0, 512, (B, T))


@pytest.fixture(params=NEW_FAMILIES)
def bundle(request: pytest.FixtureRequest, made: Any) -> Path:
    folder: Path = made(FAMILIES[request.param])[1]
    return folder


@pytest.fixture(params=CASES)
def session(request: pytest.FixtureRequest, bundle: Path) -> Session:
    return open_session(bundle, batch=B, capacity=CAPACITY, **CASES[request.param])


def close_to(got: Array, expected: Array) -> None:
    """Equal up to float32 rounding in another order of summation."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * float(np.abs(expected).max()) + 1e-6)


def every(length: int, rows: int = B) -> Array:
    return np.tile(np.arange(length), (rows, 1))


def test_pieces_and_single_tokens_equal_the_whole(session: Session) -> None:
    whole = session.prefill(TOKENS_BT, select=every(T))
    assert 0.3 < whole.std() < 3
    session.reset()
    parts = [session.prefill(TOKENS_BT[:, start:end], select=every(end - start)) for start, end in ((0, 13), (13, 14), (14, 26))]
    steps = [session.decode(TOKENS_BT[:, t])[:, None] for t in range(26, T)]
    close_to(np.concatenate([*parts, *steps], axis=1), whole)


def test_rows_are_independent_whatever_their_length_and_order(session: Session, tmp_path: Path) -> None:
    whole = session.prefill(TOKENS_BT, select=every(T))
    session.reset()
    valid = [26, 3, 9]
    last = session.prefill(TOKENS_BT[:, :26], valid)
    close_to(last[:, 0], whole[range(B), [n - 1 for n in valid]])
    session.snapshot().save(tmp_path / "state")
    step = session.decode(TOKENS_BT[range(B), valid])
    close_to(step, whole[range(B), valid])
    session.restore(Snapshot.load(tmp_path / "state"))
    np.testing.assert_array_equal(session.decode(TOKENS_BT[range(B), valid]), step)
    session.restore(Snapshot.load(tmp_path / "state"))
    session.permute([2, 0, 0])
    assert session.position.tolist() == [9, 26, 26]
    close_to(session.decode(TOKENS_BT[[2, 0, 0], [9, 26, 26]]), step[[2, 0, 0]])


def test_a_subset_of_rows_and_a_reset_touch_no_other_row(session: Session) -> None:
    whole = session.prefill(TOKENS_BT, select=every(T))
    session.reset()
    session.prefill(TOKENS_BT[:, :7])
    before = session.snapshot()
    close_to(session.prefill(TOKENS_BT[[2, 0], 7:12], rows=[2, 0], select=every(5, 2)), whole[[2, 0], 7:12])
    session.reset([0])
    close_to(session.prefill(TOKENS_BT[1:2, :9], rows=[0], select=every(9, 1)), whole[1:2, :9])
    after = session.snapshot()
    for name, array in before.leaves.items():
        np.testing.assert_array_equal(after.leaves[name][1], array[1], err_msg=name)
    assert after.position_B.tolist() == [9, 7, 12]


@pytest.mark.parametrize("graph", ["model.ort.onnx", "model.onnx"])
def test_a_prompt_of_several_blocks_gives_the_logits_of_eager_wherever_they_are_selected(bundle: Path, graph: str) -> None:
    tokens = np.random.default_rng(7).integers(0, 512, (1, 600))
    select = np.array([[599, 0, 255, 256, 300, 511, 512]])
    session = open_session(bundle, capacity=640, graph=graph)
    close_to(session.prefill(tokens[:, :597], select=np.minimum(select, 596))[:, 1:], select_of_eager(bundle, tokens, select)[:, 1:])
    close_to(session.prefill(tokens[:, 597:]), select_of_eager(bundle, tokens, select)[:, :1])


def select_of_eager(bundle: Path, tokens: Array, select: Array) -> Array:
    return open_session(bundle, runtime="eager", capacity=640).prefill(tokens, select=select)


@pytest.mark.parametrize("head_dim", [6, 12])
def test_heads_of_a_width_that_onnxruntime_attention_refuses_run_all_the_same(made: Any, head_dim: int) -> None:
    bundle = made(replace(FAMILIES["llama-tiny"], head_dim=head_dim))[1]
    tokens = TOKENS_BT[:1, :9]
    expected = open_session(bundle, runtime="eager", capacity=CAPACITY).prefill(tokens, select=every(9, 1))
    for graph in ("model.ort.onnx", "model.onnx"):
        close_to(open_session(bundle, capacity=CAPACITY, graph=graph).prefill(tokens, select=every(9, 1)), expected)
