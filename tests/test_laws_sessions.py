"""Laws of sessions on every runtime that runs here, each against the float64 oracle of the tokens that a row has seen.

B rows, T tokens, S selected tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hypothesis_profiles import law
from model_pool import POOL, RUNTIMES, SIZES, Member, Pool
from session_support import BAD, assert_same, check_fed, feed, meaning_of, state_of
from strategies_models import SEEDS, Texts, cuts, orders, subsets, texts
from wm_graph.config import FEED_FORWARDS, FORMS, MIXERS, ModelConfig
from wm_graph.errors import CapacityError, InputError
from wm_graph.tolerances import score_budget
from wm_runtimes import RUNTIMES as ALL_RUNTIMES
from wm_runtimes import Session, Snapshot, availability
from wm_runtimes.snapshot import Array

COMPILED = "log"  # the model that torch.compile is tried on: a scan, a window and experts
ONNX = [name for name in RUNTIMES if name != "eager"]
N = 90  # examples of a law in each runtime: sessions are to make three tenths of all examples


@pytest.fixture(params=RUNTIMES, scope="module")
def runtime(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass(frozen=True)
class Case:
    """A model of the pool, the sizes of a session on it, and a text for each row that fits."""

    model: str
    batch: int
    capacity: int
    texts: Texts

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # in one line

    def open(self, pool: Pool, runtime: str) -> tuple[Member, Session, list[Array]]:
        """The model, an empty session on it and the rows' tokens."""
        member = pool[self.model]
        return member, member.session(runtime, self.batch, self.capacity), self.texts.rows(member.cfg.vocab_size)


@st.composite
def cases(draw: st.DrawFn, shortest: int = 0, room: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> Case:
    """Cases whose rows have at least `shortest` tokens and leave `room`; at least one row has a token."""
    model, (batch, capacity) = draw(st.sampled_from(sorted(POOL))), draw(st.sampled_from(sizes))
    return Case(model, batch, capacity, draw(texts(batch, capacity - room, shortest).filter(lambda rows: any(rows.lengths))))


def check_next(member: Member, session: Session, runtime: str, rows: Sequence[Array]) -> int:
    """One more token for every row, and its logits; returns how many were compared."""
    assert session.position.tolist() == [len(row) for row in rows]
    longer = [np.append(row, 7) for row in rows]
    logits_BV = session.decode([7] * len(rows))
    return sum(
        member.check(runtime, row, np.array([len(row) - 1]), logits_V[None]) for row, logits_V in zip(longer, logits_BV, strict=True)
    )


# What is under law


def test_the_pool_holds_every_layer_form_and_switch() -> None:
    configs = [model.cfg for model in POOL.values()]
    assert {mixer for cfg in configs for mixer, _ in cfg.layers} == set(MIXERS)
    assert {feed_forward for cfg in configs for _, feed_forward in cfg.layers} == set(FEED_FORWARDS)
    for name, forms in FORMS.items():
        # Dynamic scaling turns what a state holds by other angles than a longer text: pieces are not the whole there, by definition.
        assert {getattr(cfg, name) for cfg in configs} == set(forms) - {"dynamic"}, name
    for name, kind in ModelConfig.__annotations__.items():
        if kind is bool and name != "rope_dynamic_cache":
            assert {getattr(cfg, name) for cfg in configs} == {False, True}, name


def test_every_runtime_that_runs_here_is_under_law() -> None:
    covered = {str(options["runtime"]) for options in RUNTIMES.values()} | {"compiled"}
    assert {name for name in ALL_RUNTIMES if availability(name) is None} <= covered


# Texts


@law(N, "session")
@given(case=cases(), edges=cuts(70), garbage=SEEDS)
def test_any_split_of_ragged_rows_equals_the_whole(pool: Pool, runtime: str, case: Case, edges: tuple[int, ...], garbage: int) -> None:
    member, session, rows = case.open(pool, runtime)
    compared = 0
    for start, end in pairwise((0, *edges, 70)):
        fed = feed(session, [row[start:end] for row in rows], garbage=garbage)
        compared += sum(check_fed(member, runtime, row, min(end, len(row)), got_SV) for row, got_SV in zip(rows, fed, strict=True))
    assert session.position.tolist() == [len(row) for row in rows]
    assume(compared)


@law(N, "session")
@given(case=cases(sizes=((3, 26), (2, 70))), garbage=SEEDS)
def test_rows_together_equal_each_row_alone(pool: Pool, runtime: str, case: Case, garbage: int) -> None:
    member, session, rows = case.open(pool, runtime)
    together, compared = feed(session, rows, garbage=garbage), 0
    for row, got_SV in zip(rows, together, strict=True):
        compared += check_fed(member, runtime, row, len(row), got_SV)
        if not len(row):
            continue
        alone_TV = feed(member.session(runtime, 1, case.capacity), [row])[0][-len(got_SV) :]
        clear_S = ~member.expected(tuple(row.tolist())).tied_T[-len(got_SV) :]
        assert np.abs(got_SV - alone_TV)[clear_S].max(initial=0.0) <= member.limit(runtime, alone_TV)
    assume(compared)


@law(N, "session")
@given(case=cases(shortest=1), data=st.data())
def test_logits_come_from_wherever_they_are_selected(pool: Pool, runtime: str, case: Case, data: st.DataObject) -> None:
    member, session, rows = case.open(pool, runtime)
    width = data.draw(st.integers(1, 5), "S")
    select_BS = np.array([data.draw(st.tuples(*[st.integers(0, len(row) - 1)] * width), "select") for row in rows])
    valid_B = np.array([len(row) for row in rows])
    tokens_BT = np.full((len(rows), valid_B.max()), -1)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = ids
    logits_BSV = session.prefill(tokens_BT, valid_B, select=select_BS)
    compared = sum(member.check(runtime, row, select_S, got_SV) for row, select_S, got_SV in zip(rows, select_BS, logits_BSV, strict=True))
    assume(compared)


@law(N, "session")
@given(case=cases(shortest=1, room=5), chunk=st.integers(1, 30), steps=st.integers(1, 5))
def test_greedy_text_takes_the_tokens_that_the_oracle_likes_best(pool: Pool, runtime: str, case: Case, chunk: int, steps: int) -> None:
    member, session, rows = case.open(pool, runtime)
    budget, compared = score_budget("argmax", member.bundle.dtype).relative, 0
    for row, text in zip(rows, session.generate([row.tolist() for row in rows], steps, stop_ids=(), chunk=chunk), strict=True):
        assert len(text) == steps
        whole = member.expected((*row.tolist(), *text))
        for step, token in enumerate(text):
            place = len(row) - 1 + step
            logits_V = whole.logits_TV[place]
            if not whole.tied_T[place]:
                assert logits_V.max() - logits_V[token] <= budget * max(1.0, float(np.sqrt(np.mean(np.square(logits_V))))), (
                    row,
                    text,
                    step,
                )
                compared += 1
    assume(compared)


# Rows


@law(N, "session")
@given(case=cases(shortest=2, sizes=((3, 26), (2, 70))), data=st.data(), garbage=SEEDS)
def test_a_subset_of_rows_in_any_order_leaves_the_others_bit_by_bit(
    pool: Pool, runtime: str, case: Case, data: st.DataObject, garbage: int
) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, [row[: len(row) // 2] for row in rows], garbage=garbage)
    before = state_of(session)
    subset = data.draw(subsets(case.batch), "rows")
    fed = feed(session, [rows[row][len(rows[row]) // 2 :] for row in subset], subset, garbage + 1)
    others = [row for row in range(case.batch) if row not in subset]
    assert_same(state_of(session), before, others)
    assume(sum(check_fed(member, runtime, rows[row], len(rows[row]), got_SV) for row, got_SV in zip(subset, fed, strict=True)))


@law(N, "session")
@given(case=cases(room=1, sizes=((3, 26), (2, 70))), data=st.data())
def test_permuted_rows_go_on_as_the_rows_they_were(pool: Pool, runtime: str, case: Case, data: st.DataObject) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before, order = state_of(session), data.draw(orders(case.batch), "order")
    session.permute(order)
    assert_same(state_of(session), before, expected_rows=list(order))
    assume(check_next(member, session, runtime, [rows[row] for row in order]))


@law(N, "session")
@given(case=cases(room=1), fresh=texts(3, 8), data=st.data())
def test_reset_rows_start_anew_and_the_others_go_on(pool: Pool, runtime: str, case: Case, fresh: Texts, data: st.DataObject) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before, reset = state_of(session), data.draw(subsets(case.batch), "reset")
    session.reset(reset)
    others = [row for row in range(case.batch) if row not in reset]
    assert_same(state_of(session), before, others)
    assert_same(state_of(session), state_of(member.session(runtime, case.batch, case.capacity, "empty")), list(reset))
    replaced = fresh.rows(member.cfg.vocab_size)
    rows = [replaced[row] if row in reset else ids for row, ids in enumerate(rows)]
    feed(session, [rows[row] for row in reset], reset)
    assume(check_next(member, session, runtime, rows))


# Snapshots


@law(N, "session")
@given(case=cases(room=2), after=texts(3, 2), through_file=st.booleans())
def test_a_snapshot_restores_every_bit_in_memory_and_through_a_file(
    pool: Pool, runtime: str, tmp_path_factory: pytest.TempPathFactory, case: Case, after: Texts, through_file: bool
) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    saved, before = session.snapshot(), state_of(session)
    if through_file:
        path = tmp_path_factory.getbasetemp() / "snapshot.safetensors"
        saved.save(path)
        saved = Snapshot.load(path)
    pieces = [*after.rows(member.cfg.vocab_size)][: case.batch]
    expected = feed(session, pieces)
    then = state_of(session)
    for target in (session, member.session(runtime, case.batch, case.capacity, "other")):
        target.restore(saved)
        assert_same(state_of(target), before)
        for got_SV, want_SV in zip(feed(target, pieces), expected, strict=True):
            np.testing.assert_array_equal(got_SV, want_SV)
        assert_same(state_of(target), then)
    longer = [np.concatenate([row, piece]) for row, piece in zip(rows, pieces, strict=True)]
    compared = sum(check_fed(member, runtime, row, len(row), got_SV) for row, got_SV in zip(longer, expected, strict=True))
    assume(compared)


@law(N, "session")
@given(case=cases(room=1), other=st.sampled_from(list(RUNTIMES)), through_file=st.booleans())
def test_a_snapshot_goes_on_in_another_runtime(
    pool: Pool, runtime: str, tmp_path_factory: pytest.TempPathFactory, case: Case, other: str, through_file: bool
) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    target = member.session(other, case.batch, case.capacity, "other")
    path = tmp_path_factory.getbasetemp() / "moved.safetensors"
    if through_file:
        session.snapshot().save(path)
    target.restore(path if through_file else session.snapshot())
    assert_same(state_of(target), state_of(session))
    assume(check_next(member, target, other, rows))


# Refusals


@law(N, "session")
@given(case=cases(), over=st.integers(1, 40), data=st.data())
def test_more_than_the_capacity_is_refused_and_every_bit_stays(
    pool: Pool, runtime: str, case: Case, over: int, data: st.DataObject
) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before, row = state_of(session), data.draw(st.integers(0, case.batch - 1), "row")
    room = case.capacity - len(rows[row])
    with pytest.raises(
        CapacityError, match=f"row {row} holds {len(rows[row])} tokens, {room + over} more exceed the capacity {case.capacity}"
    ):
        session.prefill(np.ones((1, room + over), np.int64), rows=[row])
    assert_same(state_of(session), before)
    filled = np.concatenate([rows[row], Texts(over, (room,)).rows(member.cfg.vocab_size)[0]])
    got_SV = feed(session, [filled[len(rows[row]) :]], [row])[0]
    assert session.position[row] == case.capacity
    with pytest.raises(CapacityError):
        session.decode([1], rows=[row])
    assume(check_fed(member, runtime, filled, case.capacity, got_SV) if room else False)


@law(N, "session")
@given(case=cases(room=2), bad=st.sampled_from(sorted(BAD)))
def test_bad_input_is_refused_and_every_bit_stays(pool: Pool, runtime: str, case: Case, bad: str) -> None:
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before = state_of(session)
    with pytest.raises(InputError) as caught:
        session.prefill(**BAD[bad])
    assert "\n" not in str(caught.value)
    assert_same(state_of(session), before)
    assume(check_next(member, session, runtime, rows))


# Ways of running


@law(N, "session")
@pytest.mark.parametrize("graph", ONNX)
@given(case=cases(), edges=cuts(70))
@example(case=Case("bamba", 2, 70, Texts(0, (0, 3))), edges=(2,))  # padding is left in cells past the position
def test_writing_in_place_equals_copying_bit_by_bit(pool: Pool, graph: str, case: Case, edges: tuple[int, ...]) -> None:
    member, session, rows = case.open(pool, graph)
    copying = member.session(graph, case.batch, case.capacity, "copying", alias=False)
    compared = 0
    for start, end in pairwise((0, *edges, 70)):
        pieces = [row[start:end] for row in rows]
        for row, got_SV, want_SV in zip(rows, feed(session, pieces), feed(copying, pieces), strict=True):
            np.testing.assert_array_equal(got_SV, want_SV)
            compared += check_fed(member, graph, row, min(end, len(row)), got_SV)
    assert_same(meaning_of(session), meaning_of(copying))
    assume(compared)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
@law(N, "session")
@given(data=st.data(), edges=cuts(26), garbage=SEEDS, order=orders(3))
def test_compiled_keeps_the_laws_of_splits_subsets_and_permutations(
    pool: Pool, data: st.DataObject, edges: tuple[int, ...], garbage: int, order: tuple[int, ...]
) -> None:
    member = pool[COMPILED]
    session = member.session("compiled", 3, 26)
    rows, compared = data.draw(texts(3, 25, 1), "texts").rows(member.cfg.vocab_size), 0
    for start, end in pairwise((0, *edges, 25)):
        subset = [row for row in order if start < len(rows[row])]
        subset = list(dict.fromkeys([*subset, *(row for row in range(3) if start < len(rows[row]))]))
        if subset:
            fed = feed(session, [rows[row][start:end] for row in subset], subset, garbage)
            compared += sum(check_fed(member, "compiled", rows[row], min(end, len(rows[row])), fed[at]) for at, row in enumerate(subset))
    session.permute(order)
    assume(compared + check_next(member, session, "compiled", [rows[row] for row in order]))
