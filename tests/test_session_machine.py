"""A session does what it is told, in any order: every row goes on as a fresh run of its own tokens. In each runtime.

The model of a session is one list of tokens per row. B rows, S capacity, V vocabulary.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from hypothesis_profiles import COMPARED, end_example, examples
from model_pool import COMPILED, RUNNING, SIZES, Member, Pool, models_in
from session_support import BAD, assert_same, check_fed, feed, state_of
from strategies_models import SEEDS, Texts, orders, subsets, texts
from wm_graph.errors import CapacityError, InputError
from wm_runtimes import Session, Snapshot
from wm_runtimes.snapshot import Array
from wm_runtimes.state_buffers import StateBuffers

STEPS = 30  # at most; hypothesis takes some ten on average
N = 60  # runs of the machine in each runtime
N_COMPILED = 30
ROWS = subsets(3)
MODELS = st.runner().flatmap(lambda machine: st.sampled_from(machine.models))


class SessionMachine(RuleBasedStateMachine):
    """Calls of one session, and what each row has seen."""

    saved = Bundle("saved")
    pool: Pool
    models: Sequence[str]
    runtime: str
    folder: Path

    @initialize(target=saved, model=MODELS, size=st.sampled_from(SIZES), first=texts(3, 20))
    def open(self, model: str, size: tuple[int, int], first: Texts) -> tuple[Snapshot, list[Array]]:
        self.batch, self.capacity = size
        self.member: Member = self.pool[model]
        self.session: Session = self.member.session(self.runtime, *size)
        self.rows: list[Array] = [np.zeros(0, np.int64) for _ in range(self.batch)]
        self.compared = 0
        self._feed(list(range(self.batch)), first, 70, 0)
        return self.session.snapshot(), list(self.rows)

    # Feeding

    @rule(drawn=texts(3, 66), rows=ROWS, garbage=SEEDS)
    def prefill(self, drawn: Texts, rows: tuple[int, ...], garbage: int) -> None:
        self._feed(self._mine(rows), drawn, 70, garbage)

    @rule(seed=SEEDS, rows=ROWS)
    def decode(self, seed: int, rows: tuple[int, ...]) -> None:
        open_rows = [row for row in self._mine(rows) if len(self.rows[row]) < self.capacity]
        if open_rows:
            self._feed(open_rows, Texts(seed, (1, 1, 1)), 1, 1)

    @rule(drawn=texts(3, 30), rows=ROWS, chunk=st.integers(1, 8), garbage=SEEDS)
    def prefill_in_chunks(self, drawn: Texts, rows: tuple[int, ...], chunk: int, garbage: int) -> None:
        self._feed(self._mine(rows), drawn, chunk, garbage)

    def _feed(self, rows: list[int], drawn: Texts, chunk: int, garbage: int) -> None:
        """Feed what fits of one text to each of the rows, `chunk` tokens at a time, and compare every logit that comes."""
        room = [self.capacity - len(self.rows[row]) for row in rows]
        pieces = [text[:fits] for text, fits in zip(drawn.rows(self.member.cfg.vocab_size), room, strict=False)]
        before = [len(self.rows[row]) for row in rows]
        for row, piece in zip(rows, pieces, strict=True):
            self.rows[row] = np.append(self.rows[row], piece)
        for start in range(0, max(len(piece) for piece in pieces), chunk):
            fed = feed(self.session, [piece[start : start + chunk] for piece in pieces], rows, garbage)
            for row, piece, seen, got_SV in zip(rows, pieces, before, fed, strict=True):
                place = seen + min(start + chunk, len(piece))
                self.compared += check_fed(self.member, self.runtime, self.rows[row], place, got_SV)
        self.changed = True

    # Rows

    @rule(order=orders(3))
    def permute(self, order: tuple[int, ...]) -> None:
        order = tuple(row % self.batch for row in order[: self.batch])
        self.session.permute(order)
        self.rows, self.changed = [self.rows[row] for row in order], True

    @rule(rows=st.none() | ROWS)
    def reset(self, rows: tuple[int, ...] | None) -> None:
        chosen = None if rows is None else self._mine(rows)
        self.session.reset(chosen)
        for row in range(self.batch) if chosen is None else chosen:
            self.rows[row] = np.zeros(0, np.int64)
        self.changed = True

    # Snapshots

    @rule(target=saved)
    def snapshot(self) -> tuple[Snapshot, list[Array]]:
        return self.session.snapshot(), list(self.rows)

    @rule(taken=saved, way=st.sampled_from(("memory", "file", "path")))
    def restore(self, taken: tuple[Snapshot, list[Array]], way: str) -> None:
        snapshot, rows = taken
        path = self.folder / "state.safetensors"
        if way != "memory":
            snapshot.save(path)
        self.session.restore({"memory": snapshot, "path": path}.get(way) or Snapshot.load(path))
        self.rows, self.changed = list(rows), True

    # Refusals

    @rule(bad=st.none() | st.sampled_from(sorted(BAD)), row=st.integers(0, 2), over=st.integers(1, 40))
    def feed_what_is_refused(self, bad: str | None, row: int, over: int) -> None:
        """Bad input, or more than a row has room for."""
        row, before = row % self.batch, state_of(self.session)
        if bad is None:
            with pytest.raises(CapacityError):
                self.session.prefill(np.ones((1, self.capacity - len(self.rows[row]) + over), np.int64), rows=[row])
        else:
            with pytest.raises(InputError):  # in a full row, a CapacityError
                self.session.prefill(**BAD[bad])
        assert_same(state_of(self.session), before)

    # What holds after every step

    @invariant()
    def positions_are_the_numbers_of_tokens_seen(self) -> None:
        assert self.session.position.tolist() == [len(row) for row in self.rows]

    @precondition(lambda self: self.changed)
    @invariant()
    def every_row_goes_on_as_a_fresh_run_of_its_tokens(self) -> None:
        """The next token's logits, asked of a twin so that the asking leaves no trace, equal the oracle's and those of a new session."""
        self.changed = False
        twin = self.member.session(self.runtime, self.batch, self.capacity, "twin")
        twin.restore(self.session.snapshot())
        rows = [row for row in range(self.batch) if len(self.rows[row]) < self.capacity]
        if not rows:
            return
        longer = [np.append(self.rows[row], (11 * len(self.rows[row]) + row) % self.member.cfg.vocab_size) for row in rows]
        for row, logits_V in zip(longer, twin.decode([row[-1] for row in longer], rows=rows), strict=True):
            self.compared += check_fed(self.member, self.runtime, row, len(row), logits_V[None])
            if not self.member.expected(tuple(row.tolist())).tied_T[-1]:
                fresh_V = self.member.session(self.runtime, 1, self.capacity, "fresh").prefill(row[None])[0, 0]
                assert np.abs(fresh_V - logits_V).max() <= self.member.limit(self.runtime, fresh_V)

    def teardown(self) -> None:
        """One run is one example, whatever its steps; those that failed or compared nothing are not counted."""
        failed = sys.exc_info()[0] is not None
        end_example(failed)
        if not failed and getattr(self, "compared", 0):
            COMPARED["session"] += 1

    def _mine(self, rows: tuple[int, ...]) -> list[int]:
        """Of rows drawn for three, those that this session has."""
        return [row for row in rows if row < self.batch] or [0]


@pytest.mark.parametrize("runtime", RUNNING)
def test_every_row_equals_a_fresh_run_of_its_own_tokens(pool: Pool, runtime: str, tmp_path: Path) -> None:
    machine = type(
        "SessionMachine", (SessionMachine,), {"pool": pool, "models": models_in(runtime), "runtime": runtime, "folder": tmp_path}
    )
    before, runs = COMPARED["session"], N_COMPILED if runtime in COMPILED else N
    run_state_machine_as_test(machine, settings=settings(examples(runs), stateful_step_count=STEPS))
    assert COMPARED["session"] - before >= runs // 2  # runs that fed nothing compared nothing


@pytest.mark.parametrize(("runtime", "leaf"), [("model.onnx", "ssd"), ("model.ort.onnx", "score")])
def test_a_session_that_hands_state_on_fails_the_example_it_is_from(
    pool: Pool, runtime: str, leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StateBuffers.reset

    def forgetful(self: StateBuffers, rows: Array) -> None:
        kept = {name: array for name, array in self.copy().items() if leaf in name}
        right(self, rows)
        self.fill(self.copy() | kept)

    monkeypatch.setattr(StateBuffers, "reset", forgetful)
    machine = type("SessionMachine", (SessionMachine,), {"pool": pool, "models": ["cheems"], "runtime": runtime, "folder": tmp_path})
    with pytest.raises(AssertionError, match=rf"cheems in {runtime}: reset leaves what was in \S*{leaf}") as caught:
        run_state_machine_as_test(machine, settings=settings(examples(5), stateful_step_count=2))
    told = "\n".join(caught.value.__notes__)
    assert "state = SessionMachine()" in told
    assert "@reproduce_failure" in told
