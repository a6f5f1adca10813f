"""Laws of sessions on every runtime that runs here, each against the float64 oracle of the tokens that a row has seen.

B rows, T tokens, S selected tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import test_session_machine as machine
from hypothesis_profiles import law, note_compared
from model_pool import POOL, RUNNING, SIZES, Member, Pool, models_in, options_of
from session_support import BAD, assert_same, check_fed, feed, meaning_of, state_of
from strategies_models import SEEDS, Drawn, Split, Texts, drawn, orders, splits, subsets, texts
from wm_graph.config import FEED_FORWARDS, FORMS, MIXERS, ModelConfig
from wm_graph.errors import CapacityError, InputError
from wm_graph.params import Params, map_tensors, params_from_flat, params_to_flat
from wm_graph.tolerances import score_budget
from wm_runtimes import RUNTIMES as ALL_RUNTIMES
from wm_runtimes import Session, Snapshot, availability
from wm_runtimes.snapshot import Array

ONNX = [name for name in RUNNING if name.endswith(".onnx")]
N = 90  # examples of a law in each runtime: sessions are to make three tenths of all examples
N_WINDOWS = 45  # each feeds three sessions
SHORT = 20  # keys of a window that holds every key


each_runtime = pytest.mark.parametrize("runtime", RUNNING)


@dataclass(frozen=True)
class Case:
    """A model of the pool, the sizes of a session on it, a text for each row that fits, and where to cut the longest."""

    model: str
    batch: int
    capacity: int
    texts: Texts
    edges: tuple[int, ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # in one line

    def open(self, pool: Pool, runtime: str) -> tuple[Member, Session, list[Array]]:
        """The model, an empty session on it and the rows' tokens."""
        member = pool[self.model]
        return member, member.session(runtime, self.batch, self.capacity), self.texts.rows(member.cfg.vocab_size)


@st.composite
def cases(draw: st.DrawFn, runtime: str, shortest: int = 0, room: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> Case:
    """Cases of the runtime's models whose rows have at least `shortest` tokens and leave `room`; at least one row has a token."""
    model, (batch, capacity) = draw(st.sampled_from(models_in(runtime))), draw(st.sampled_from(sizes))
    return Case(model, batch, capacity, draw(texts(batch, capacity - room, shortest).filter(lambda rows: any(rows.lengths))))


@st.composite
def split_cases(draw: st.DrawFn, runtime: str) -> Case:
    """Cases whose longest row is cut inside; a fifth of them or more reach the chunk of 64 tokens."""
    model, long = draw(st.sampled_from(models_in(runtime))), draw(st.booleans())
    batch, capacity = SIZES[-1] if long else draw(st.sampled_from(SIZES))
    return Case(model, batch, capacity, *draw(splits(batch, capacity, long=long)))


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


def test_every_runtime_that_runs_here_is_under_every_law() -> None:
    available = {name for name in ALL_RUNTIMES if availability(name) is None}
    tests = [test for name, test in globals().items() if name.startswith("test_") and "runtime" in signature(test).parameters]
    for test in [*tests, machine.test_every_row_equals_a_fresh_run_of_its_own_tokens]:
        assert runtimes_of(test) >= available, test.__name__
    assert len(tests) >= 12


def runtimes_of(test: Any) -> set[str]:
    """The runtimes that pytest will run a test in."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "runtime"]
    return {options_of(name)["runtime"] for mark in marks for name in mark.args[1]}


# Texts


@each_runtime
@law(N, "session")
@given(data=st.data(), garbage=SEEDS)
def test_any_split_of_ragged_rows_equals_the_whole(pool: Pool, runtime: str, garbage: int, data: st.DataObject) -> None:
    case = data.draw(split_cases(runtime), "case")
    member, session, rows = case.open(pool, runtime)
    compared = 0
    for start, end in pairwise((0, *case.edges, max(case.texts.lengths))):
        fed = feed(session, [row[start:end] for row in rows], garbage=garbage)
        compared += sum(check_fed(member, runtime, row, min(end, len(row)), got_SV) for row, got_SV in zip(rows, fed, strict=True))
    assert session.position.tolist() == [len(row) for row in rows]
    assume(compared)


@each_runtime
@law(N, "session")
@given(data=st.data(), garbage=SEEDS)
def test_rows_together_equal_each_row_alone(pool: Pool, runtime: str, garbage: int, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, sizes=((3, 26), (2, 70))), "case")
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


@each_runtime
@law(N, "session")
@given(data=st.data())
def test_logits_come_from_wherever_they_are_selected(pool: Pool, runtime: str, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, shortest=1), "case")
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


@each_runtime
@law(N, "session")
@given(data=st.data(), chunk=st.integers(1, 30), steps=st.integers(1, 5))
def test_greedy_text_takes_the_tokens_that_the_oracle_likes_best(
    pool: Pool, runtime: str, chunk: int, steps: int, data: st.DataObject
) -> None:
    case = data.draw(cases(runtime, shortest=1, room=5), "case")
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
    note_compared(compared)


@each_runtime
@law(N, "session")
@given(data=st.data(), change=SEEDS)
def test_later_tokens_do_not_reach_earlier_logits(pool: Pool, runtime: str, change: int, data: st.DataObject) -> None:
    """Of every row some tokens stay and each later one becomes another, all logits selected; the oracle is given what stays alone."""
    case = data.draw(cases(runtime, shortest=2), "case")
    member, session, rows = case.open(pool, runtime)
    generator, V = np.random.default_rng(change), member.cfg.vocab_size
    stays = [int(generator.integers(1, len(row))) for row in rows]
    others = [np.append(row[:n], (row[n:] + generator.integers(1, V, len(row) - n)) % V) for row, n in zip(rows, stays, strict=True)]
    told = feed(session, rows), feed(member.session(runtime, case.batch, case.capacity), others)
    for row, n, one_TV, other_TV in zip(rows, stays, *told, strict=True):
        clear_n = ~member.expected(tuple(row[:n].tolist())).tied_T
        assert np.abs(one_TV[:n] - other_TV[:n])[clear_n].max(initial=0.0) <= member.limit(runtime, one_TV[:n])
        assert sum(member.check(runtime, row[:n], np.arange(n), got_TV[:n]) for got_TV in (one_TV, other_TV)) == 2 * clear_n.sum()


# Windows


@dataclass(frozen=True)
class Unscored(Drawn):
    """A model whose keys all score 0."""

    def params(self, dtype: torch.dtype = torch.float32) -> Params:
        """The parameters."""
        zeroed: Params = map_tensors(super().params(dtype), lambda name, value: value * 0 if name.endswith("mixer.A") else value)
        return zeroed


@dataclass(frozen=True)
class Unwindowed(Drawn):
    """What `Unscored` is where the window holds every key: plain attention of the same parameters."""

    def params(self, dtype: torch.dtype = torch.float32) -> Params:
        """The parameters."""
        windowed = drawn(self.layers.replace("attention", "dynamic_mask_attention"), self.seed, **dict(self.options))
        tensors = params_to_flat(windowed.cfg, windowed.params(dtype))
        return params_from_flat(self.cfg, {name: value for name, value in tensors.items() if not name.endswith(("mixer.A", "mixer.dt"))})


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """One model with a window of 20 keys, with one of 70, and without."""
    layers = "dynamic_mask_attention+mlp ssd+none"
    models = {f"window {W}": Unscored(layers, 14, (("keep_window", W), ("mlp_bias", True))) for W in (SHORT, 70)}
    models["plain"] = Unwindowed(layers.replace("dynamic_mask_", ""), 14, (("mlp_bias", True),))
    return Pool(tmp_path_factory.mktemp("windows"), models)


@pytest.mark.parametrize("graph", ONNX)
@law(N_WINDOWS, "session")
@given(split=splits(2, SHORT), garbage=SEEDS)
def test_windows_that_hold_every_key_of_equal_score_are_one_another_and_plain_attention(
    windows: Pool, graph: str, split: Split, garbage: int
) -> None:
    text, edges = split
    plain, compared = windows["plain"], 0
    sessions = [windows[name].session(graph, 2, 70) for name in ("plain", f"window {SHORT}", "window 70")]
    rows = text.rows(plain.cfg.vocab_size)
    for start, end in pairwise((0, *edges, max(text.lengths))):
        fed = [feed(session, [row[start:end] for row in rows], garbage=garbage) for session in sessions]
        for row, *told in zip(rows, *fed, strict=True):
            compared += sum(check_fed(plain, graph, row, min(end, len(row)), got_SV) for got_SV in told)
            assert all(np.abs(got_SV - told[0]).max(initial=0.0) <= plain.limit(graph, told[0]) for got_SV in told)
    assume(compared)


# Rows


@each_runtime
@law(N, "session")
@given(data=st.data(), garbage=SEEDS)
def test_a_subset_of_rows_in_any_order_leaves_the_others_bit_by_bit(pool: Pool, runtime: str, garbage: int, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, shortest=2, sizes=((3, 26), (2, 70))), "case")
    member, session, rows = case.open(pool, runtime)
    feed(session, [row[: len(row) // 2] for row in rows], garbage=garbage)
    before = state_of(session)
    subset = data.draw(subsets(case.batch), "rows")
    fed = feed(session, [rows[row][len(rows[row]) // 2 :] for row in subset], subset, garbage + 1)
    others = [row for row in range(case.batch) if row not in subset]
    assume(others or list(subset) != sorted(subset))
    assert_same(state_of(session), before, others)
    assume(sum(check_fed(member, runtime, rows[row], len(rows[row]), got_SV) for row, got_SV in zip(subset, fed, strict=True)))


@each_runtime
@law(N, "session")
@given(data=st.data())
def test_permuted_rows_go_on_as_the_rows_they_were(pool: Pool, runtime: str, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, room=1, sizes=((3, 26), (2, 70))), "case")
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before, order = state_of(session), data.draw(orders(case.batch), "order")
    session.permute(order)
    assume(any(len(rows[row]) for row in order) and any((array != array[list(order)]).any() for array in before.values()))
    assert_same(state_of(session), before, expected_rows=list(order))
    assume(check_next(member, session, runtime, [rows[row] for row in order]))


@each_runtime
@law(N, "session")
@given(data=st.data(), fresh=texts(3, 8))
def test_reset_rows_start_anew_and_the_others_go_on(pool: Pool, runtime: str, fresh: Texts, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, room=1), "case")
    member, session, rows = case.open(pool, runtime)
    feed(session, rows)
    before, reset = state_of(session), data.draw(subsets(case.batch), "reset")
    assume(any(len(rows[row]) for row in reset))
    session.reset(reset)
    others = [row for row in range(case.batch) if row not in reset]
    assert_same(state_of(session), before, others)
    assert_same(state_of(session), state_of(member.session(runtime, case.batch, case.capacity, "empty")), list(reset))
    replaced = fresh.rows(member.cfg.vocab_size)
    rows = [replaced[row] if row in reset else ids for row, ids in enumerate(rows)]
    feed(session, [rows[row] for row in reset], reset)
    assume(check_next(member, session, runtime, rows))


# Snapshots


@each_runtime
@law(N, "session")
@given(data=st.data(), after=texts(3, 2), through_file=st.booleans())
def test_a_snapshot_restores_every_bit_in_memory_and_through_a_file(
    pool: Pool, runtime: str, tmp_path_factory: pytest.TempPathFactory, after: Texts, through_file: bool, data: st.DataObject
) -> None:
    case = data.draw(cases(runtime, room=2), "case")
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


@each_runtime
@law(N, "session")
@given(data=st.data(), through_file=st.booleans())
def test_a_snapshot_goes_on_in_another_runtime(
    pool: Pool, runtime: str, tmp_path_factory: pytest.TempPathFactory, through_file: bool, data: st.DataObject
) -> None:
    case = data.draw(cases(runtime, room=1), "case")
    other = data.draw(st.sampled_from([name for name in RUNNING if case.model in models_in(name)]), "other")
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


@each_runtime
@law(N, "session")
@given(data=st.data(), over=st.integers(1, 40))
def test_more_than_the_capacity_is_refused_and_every_bit_stays(pool: Pool, runtime: str, over: int, data: st.DataObject) -> None:
    case = data.draw(cases(runtime), "case")
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


@each_runtime
@law(N, "session")
@given(data=st.data(), bad=st.sampled_from(sorted(BAD)))
def test_bad_input_is_refused_and_every_bit_stays(pool: Pool, runtime: str, bad: str, data: st.DataObject) -> None:
    case = data.draw(cases(runtime, room=2), "case")
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
@given(case=split_cases(ONNX[0]))
@example(case=Case("bamba", 2, 70, Texts(0, (0, 3)), (2,)))  # padding is left in cells past the position
def test_writing_in_place_equals_copying_bit_by_bit(pool: Pool, graph: str, case: Case) -> None:
    member, session, rows = case.open(pool, graph)
    copying = member.session(graph, case.batch, case.capacity, "copying", alias=False)
    compared = 0
    for start, end in pairwise((0, *case.edges, max(case.texts.lengths))):
        pieces = [row[start:end] for row in rows]
        for row, got_SV, want_SV in zip(rows, feed(session, pieces), feed(copying, pieces), strict=True):
            np.testing.assert_array_equal(got_SV, want_SV)
            compared += check_fed(member, graph, row, min(end, len(row)), got_SV)
    assert_same(meaning_of(session), meaning_of(copying))
    assume(compared)
