"""Generation on the toy bundle: what it feeds, samples and leaves behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toy_bundle import assert_same_state, make_toy_bundle, state_of
from wm_graph.errors import CapacityError, CheckpointError, InputError
from wm_runtimes import Session, open_session


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def session(toy: Path) -> Session:
    return open_session(toy, batch=3, capacity=12)


def greedy(session: Session, prompt: list[int], steps: int) -> list[int]:
    session.reset()
    chosen = [int(session.prefill(prompt)[0, 0].argmax())]
    while len(chosen) < steps:
        chosen.append(int(session.decode(chosen[-1:])[0].argmax()))
    return chosen


def test_greedy_generation_equals_argmax_step_by_step(toy: Path) -> None:
    session = open_session(toy, capacity=64)
    expected = greedy(session, [5, 3, 2], 20)
    assert session.generate([[5, 3, 2]], 20, stop_ids=()) == [expected]
    assert session.position.tolist() == [3 + 19]


@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_prompts_of_different_lengths_generate_as_each_alone(toy: Path, chunk: int) -> None:
    prompts = [[5, 3, 2], [9], [4, 4, 4, 4, 8, 1], [2, 2]]
    together = open_session(toy, batch=4, capacity=64)
    alone = open_session(toy, capacity=64)
    expected = [greedy(alone, prompt, 12) for prompt in prompts]
    assert together.generate(prompts, 12, stop_ids=(), chunk=chunk) == expected
    stop = expected[0][2]
    cut = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert together.generate(prompts, 12, stop_ids=[stop], chunk=chunk) == cut
    assert together.position.tolist() == [len(prompt) + min(len(row), 11) for prompt, row in zip(prompts, cut, strict=True)]


def test_rows_end_where_on_token_says_and_keep_their_place(toy: Path) -> None:
    session = open_session(toy, batch=4, capacity=64)
    alone = open_session(toy, capacity=64)
    prompts = [[5, 3, 2], [9], [2, 2]]
    limits = {0: 2, 1: 9, 2: 5}
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def on_token(row: int, token: int) -> bool:
        seen[row].append(token)
        return len(seen[row]) == limits[row]

    session.prefill([7], rows=[3])
    bystander = {name: array[3].copy() for name, array in state_of(session).items()}
    chosen = session.generate(prompts, 20, stop_ids=(), on_token=on_token)
    assert chosen == [greedy(alone, prompt, limits[row]) for row, prompt in enumerate(prompts)]
    assert list(seen.values()) == chosen
    assert session.position.tolist() == [3 + 1, 1 + 8, 2 + 4, 1]
    for name, array in state_of(session).items():
        np.testing.assert_array_equal(array[3], bystander[name])


def test_an_exception_in_on_token_leaves_every_row_in_its_place(toy: Path) -> None:
    session = open_session(toy, batch=3, capacity=64)

    count = {0: 0, 1: 0, 2: 0}

    def on_token(row: int, token: int) -> bool:
        count[row] += 1
        if count[row] == 6:
            raise KeyError
        return row == 0 and count[row] == 2

    with pytest.raises(KeyError):
        session.generate([[1, 2], [3], [4, 5, 6]], 30, stop_ids=(), on_token=on_token)
    assert session.position.tolist() == [2 + 1, 1 + 5, 3 + 5]


def test_a_sampled_row_does_not_depend_on_the_other_rows(toy: Path) -> None:
    prompts = [[5, 3, 2], [9], [2, 2]]
    options: dict[str, Any] = {"temperature": 20.0, "top_k": 12, "top_p": 0.95, "seed": 3, "stop_ids": ()}
    together = open_session(toy, batch=3, capacity=64).generate(prompts, 16, **options)
    assert open_session(toy, capacity=64).generate(prompts[:1], 16, **options) == together[:1]
    assert open_session(toy, batch=2, capacity=64).generate([[1], [9]], 16, **options)[1] == together[1]
    assert open_session(toy, batch=3, capacity=64).generate(prompts, 16, **options | {"seed": 4}) != together


def test_generation_continues_what_a_row_has_seen_when_asked(toy: Path) -> None:
    session = open_session(toy, capacity=64)
    whole = session.generate([[5, 3, 2, 7]], 8, stop_ids=())
    session.reset()
    session.prefill([5, 3])
    assert session.generate([[2, 7]], 8, stop_ids=(), reset=False) == whole


def test_bundle_stop_ids_end_a_row_by_default(tmp_path: Path, toy: Path) -> None:
    expected = open_session(toy, capacity=64).generate([[5, 3]], 10, stop_ids=())[0]
    tokens = {"bos": 0, "eos": 1, "pad": None, "stop": [expected[3]], "add_bos": False}
    stopping = open_session(make_toy_bundle(tmp_path / "bundle", tokens=tokens), capacity=64)
    assert stopping.generate([[5, 3]], 10)[0] == expected[: expected.index(expected[3])]


BAD_GENERATIONS = {
    "no prompts": ({"prompts": []}, InputError, "prompts"),
    "too many": ({"prompts": [[1]] * 4}, InputError, r"1\.\.3"),
    "an empty prompt": ({"prompts": [[1], []]}, InputError, "prompt 1"),
    "a flat prompt": ({"prompts": [1, 2]}, InputError, "prompt 0"),
    "text": ({"prompts": "abc"}, InputError, "prompts"),
    "a bad id": ({"prompts": [[1], [2, 99]]}, InputError, "prompt 1: id 99 at index 1"),
    "too long": ({"prompts": [[1] * 10], "max_tokens": 4}, CapacityError, "need a capacity of 13, not 12"),
    "negative max_tokens": ({"prompts": [[1]], "max_tokens": -1}, InputError, "max_tokens"),
    "temperature": ({"prompts": [[1]], "temperature": -1.0}, InputError, "temperature"),
    "top_k": ({"prompts": [[1]], "top_k": -1}, InputError, "top_k"),
    "top_p": ({"prompts": [[1]], "top_p": 0.0}, InputError, "top_p"),
    "seed": ({"prompts": [[1]], "max_tokens": 2, "seed": -1, "temperature": 1.0}, InputError, "seed"),
    "chunk": ({"prompts": [[1]], "max_tokens": 2, "chunk": 0}, InputError, "chunk"),
}


@pytest.mark.parametrize("case", BAD_GENERATIONS)
def test_bad_generation_arguments_are_refused_and_the_state_unchanged(session: Session, case: str) -> None:
    session.prefill([[1, 2], [3, 4], [5, 6]])
    before = state_of(session)
    arguments, error, message = BAD_GENERATIONS[case]
    with pytest.raises(error, match=message):
        session.generate(**arguments)
    assert_same_state(session, before)


def test_generating_nothing_feeds_the_prompts(session: Session) -> None:
    assert session.generate([[1, 2], [3]], 0) == [[], []]
    assert session.position.tolist() == [2, 1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_a_generation_by_name(session: Session, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    run = session._run

    def poisoned(*arguments: Any) -> np.ndarray:
        logits_BSV = run(*arguments)
        logits_BSV[1] = bad if session.position[1] > 1 else logits_BSV[1]
        return logits_BSV

    monkeypatch.setattr(session, "_run", poisoned)
    with pytest.raises(CheckpointError, match="not finite in row 1"):
        session.generate([[1], [2]], 5, stop_ids=())
