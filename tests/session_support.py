"""Feeding sessions and comparing their states, for the laws and the state machine. B rows, T tokens, S selected tokens, V vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_pool import Member
from wm_runtimes import Session
from wm_runtimes.snapshot import Array

# Calls of `prefill` that every session of the pool refuses; the vocabulary has 61 tokens.
BAD: dict[str, dict[str, Any]] = {
    "an id below 0": {"tokens": [[1, -1]], "rows": [0]},
    "an id past the vocabulary": {"tokens": [[61]], "rows": [0]},
    "floats": {"tokens": [[1.0]], "rows": [0]},
    "ragged lists": {"tokens": [[1], [1, 2]], "rows": [0, 1]},
    "three dimensions": {"tokens": [[[1]]], "rows": [0]},
    "valid past the tokens": {"tokens": [[1]], "valid": [2], "rows": [0]},
    "valid below 0": {"tokens": [[1]], "valid": [-1], "rows": [0]},
    "a row too many": {"tokens": [[1]], "rows": [99]},
    "a row twice": {"tokens": [[1], [1]], "rows": [0, 0]},
    "no row": {"tokens": np.ones((0, 1), int), "rows": []},
    "select past valid": {"tokens": [[1, 2]], "valid": [1], "select": [[1]], "rows": [0]},
    "select below 0": {"tokens": [[1, 2]], "select": [[-1]], "rows": [0]},
}


def feed(session: Session, pieces: Sequence[Array], rows: Sequence[int] | None = None, garbage: int = 0) -> list[Array]:
    """Feed a piece to each row, padded with anything; the logits after every token of each piece, [T of the piece, V].

    The logits of all tokens are selected where every row has one, else those of each row's last.
    """
    valid_B = np.array([len(piece) for piece in pieces])
    longest = int(valid_B.max())
    tokens_BT = np.random.default_rng(garbage).integers(-(2**40), 2**40, (len(pieces), longest))
    for row, piece in enumerate(pieces):
        tokens_BT[row, : len(piece)] = piece
    if (valid_B == 1).all() and garbage % 2:
        return list(session.decode(tokens_BT[:, 0], rows=rows)[:, None])
    if valid_B.all():
        logits_BTV = session.prefill(tokens_BT, valid_B, rows=rows, select=np.minimum(np.arange(longest), valid_B[:, None] - 1))
        return [logits_TV[:valid] for logits_TV, valid in zip(logits_BTV, valid_B, strict=True)]
    last_B1V = session.prefill(tokens_BT, valid_B, rows=rows)
    return [last_1V[: min(valid, 1)] for last_1V, valid in zip(last_B1V, valid_B, strict=True)]


def check_fed(member: Member, runtime: str, row: Array, fed: int, got_SV: Array) -> int:
    """Assert what `feed` gave for a row of which `fed` tokens are in the session now; returns how many logits were compared."""
    return member.check(runtime, row, np.arange(fed - len(got_SV), fed), got_SV)


def state_of(session: Session) -> dict[str, Array]:
    saved = session.snapshot()
    return saved.leaves | {"position": saved.position_B}


def meaning_of(session: Session) -> dict[str, Array]:
    """The state, cells of caches past the position, which padding may leave anything in, as zeros."""
    state = state_of(session)
    for leaf in session.bundle.state:
        if "capacity" in leaf.shape:
            axis = leaf.shape.index("capacity")
            past_BS = np.arange(session.capacity) >= state["position"][:, None]
            shape = [1] * state[leaf.name].ndim
            shape[0], shape[axis] = past_BS.shape
            state[leaf.name] = np.where(past_BS.reshape(shape), 0, state[leaf.name]).astype(state[leaf.name].dtype)
    return state


def assert_same(got: dict[str, Array], expected: dict[str, Array], rows: Any = slice(None), expected_rows: Any = None) -> None:
    """The states are equal bit by bit in the given rows."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        want = array[rows if expected_rows is None else expected_rows]
        np.testing.assert_array_equal(got[name][rows].view(np.uint8), want.view(np.uint8), err_msg=name)
