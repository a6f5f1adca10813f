"""Session: what every runtime shares. It checks input, tracks positions on the host, and hands clean arrays to the runtime.

B batch, T tokens, S selected tokens, V vocabulary.
"""

import os
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

import numpy as np

from wm_graph.errors import BundleError, CheckpointError, InputError, WmError
from wm_runtimes.bundle import Bundle
from wm_runtimes.inputs import check_ids, check_room, check_rows, check_select, check_tokens, check_valid, integers
from wm_runtimes.snapshot import Snapshot
from wm_runtimes.state_buffers import Buffers, StateBuffers

Array = np.ndarray[Any, np.dtype[Any]]


class Session(ABC):
    """A model with the state of `batch` rows, each of which can hold `capacity` tokens. numpy in, numpy out.

    Every call is checked before it runs: after an `InputError` or `CapacityError` the state is what it was.
    A session serves one thread at a time. Use it as a context manager, or call `close`.

    Args:
        bundle: the bundle to run.
        batch: number of rows.
        capacity: most tokens that a row can hold, at most the bundle's max_position.

    Raises:
        InputError: batch or capacity is out of range.
    """

    runtime = ""

    def __init__(self, bundle: Bundle, batch: int = 1, capacity: int = 1024) -> None:
        for name, value, limit in (("batch", batch, 2**31), ("capacity", capacity, bundle.limits.max_position)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= limit:
                raise InputError(f"{name} is {value!r}, expected an integer within 1..{limit}")
        self.bundle = bundle
        self.batch = int(batch)
        self.capacity = int(capacity)
        self._position_B = np.zeros(self.batch, np.int64)
        self._touched_B = np.zeros(self.batch, bool)
        self._all_rows_B = np.arange(self.batch)
        self._buffers: Buffers = self._make_buffers(self.batch)
        self._subset: Buffers | None = None
        self._closed = False
        self._broken = False

    @abstractmethod
    def _run(self, buffers: Any, start: int, position_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        """Run rows start..start+B-1 of `buffers`, whose state is advanced, and return new float32 logits [B, S, V]."""

    @abstractmethod
    def placement(self) -> dict[str, list[str]]:
        """Where the model runs: device or execution provider -> names of the nodes placed there."""

    @property
    def position(self) -> Array:
        """Tokens seen by each row, int64 [B]; a copy."""
        return self._position_B.copy()

    def prefill(self, tokens: Any, valid: Any = None, rows: Any = None, select: Any = None) -> Array:
        """Feed tokens to rows.

        Args:
            tokens: integers [B, T], or [T] for one row. Tokens at or past `valid` are padding and may hold anything.
            valid: number of tokens of each row, [B] within 0..T; None means T. A row with 0 stays as it is.
            rows: unique numbers of the rows to feed, in the order of `tokens`; None means all. Neighbours in order run without a copy.
            select: indices [B, S] of the tokens whose logits are wanted, each below its row's valid; None means the last valid one.

        Returns:
            Logits [B, S, V] float32. With select=None a row with no valid token gets zeros.

        Raises:
            InputError: an argument is malformed, or a token is outside the vocabulary.
            CapacityError: a row would exceed the capacity.
        """
        rows_B = self._rows(rows)
        tokens_BT = check_tokens(tokens, len(rows_B))
        valid_B = check_valid(valid, len(rows_B), tokens_BT.shape[1])
        select_BS = check_select(select, valid_B)
        check_room(self._position_B[rows_B], valid_B, rows_B, self.capacity)
        # The graph needs room for the padding too, so nothing longer than the longest row is run.
        tokens_BT = check_ids(tokens_BT, valid_B, self.bundle.limits.vocab_size)[:, : int(valid_B.max())]
        return self._advance(rows_B, tokens_BT, valid_B, select_BS)

    def decode(self, tokens: Any, rows: Any = None) -> Array:
        """Feed one token to each row: `prefill` with T = 1.

        Args:
            tokens: integers [B] or [B, 1].
            rows: as in `prefill`.

        Returns:
            Logits [B, V] float32.

        Raises:
            InputError: an argument is malformed, or a token is outside the vocabulary.
            CapacityError: a row is full.
        """
        rows_B = self._rows(rows)
        tokens_B = integers(tokens, "tokens")
        if tokens_B.shape not in ((len(rows_B),), (len(rows_B), 1)):
            raise InputError(f"tokens: shape {list(tokens_B.shape)}, expected [{len(rows_B)}], one token per row")
        valid_B = np.ones(len(rows_B), np.int64)
        check_room(self._position_B[rows_B], valid_B, rows_B, self.capacity)
        tokens_B1 = check_ids(tokens_B.reshape(-1, 1), valid_B, self.bundle.limits.vocab_size)
        return self._advance(rows_B, tokens_B1, valid_B, np.zeros((len(rows_B), 1), np.int64))[:, 0]

    def generate(self, prompts: Any, max_tokens: int = 128, **options: Any) -> list[list[int]]:
        """Continue prompts; see `wm_runtimes.generate.generate`, which takes the same arguments."""
        from wm_runtimes.generate import generate

        return generate(self, prompts, max_tokens, **options)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state."""
        self._check_usable()
        return Snapshot(self.bundle.fingerprint, self.bundle.name, self.batch, self.capacity, self.position, self._buffers.copy())

    def restore(self, snapshot: Snapshot | str | os.PathLike[str]) -> None:
        """Return to a snapshot, or a file of one, of this session or another on the same bundle, batch and capacity, whatever its runtime.

        Raises:
            InputError: the snapshot does not fit or cannot be read; the state is unchanged.
        """
        self._check_open()
        if isinstance(snapshot, str | os.PathLike):
            snapshot = Snapshot.load(snapshot)
        if not isinstance(snapshot, Snapshot):
            raise InputError(f"snapshot is {type(snapshot).__name__}, expected a Snapshot or the path of a saved one")
        self._check_fits(snapshot)
        self._buffers.fill(snapshot.leaves)
        self._position_B[:] = snapshot.position_B
        self._touched_B[:] = True
        self._broken = False

    def reset(self, rows: Any = None) -> None:
        """Empty rows; None means all.

        Raises:
            InputError: `rows` is malformed.
        """
        self._check_open()
        rows_B = self._all_rows_B if rows is None else check_rows(rows, self.batch)
        self._buffers.reset(rows_B[self._touched_B[rows_B]])
        self._position_B[rows_B] = 0
        self._touched_B[rows_B] = False
        if len(rows_B) == self.batch:
            self._broken = False

    def permute(self, rows: Any) -> None:
        """Row i takes the state that row rows[i] had: a reordering, or with repeats a choice of beams.

        Args:
            rows: integers [batch] within 0..batch-1.

        Raises:
            InputError: `rows` is malformed.
        """
        self._check_usable()
        rows_B = integers(rows, "rows")
        if rows_B.shape != (self.batch,) or ((rows_B < 0) | (rows_B >= self.batch)).any():
            raise InputError(f"rows: {rows_B.tolist()!s:.60}, expected {self.batch} numbers within 0..{self.batch - 1}")
        rows_B = rows_B.astype(np.int64)
        self._buffers.permute(rows_B)
        self._position_B[:] = self._position_B[rows_B]
        self._touched_B[:] = self._touched_B[rows_B]

    def close(self) -> None:
        """Free the state and the model; later calls are refused. Calling it twice is harmless."""
        self._closed = True
        self._subset = None
        self._buffers = StateBuffers((), self.batch, self.capacity, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _make_buffers(self, batch: int) -> Buffers:
        return StateBuffers(self.bundle.state, batch, self.capacity, self.bundle.config.keep_window)

    def _runs_from(self, start: int) -> bool:
        """Whether rows can run where they are, if the first of them is `start`."""
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the session is closed; open another one")

    def _check_usable(self) -> None:
        self._check_open()
        if self._broken:
            raise InputError("a run failed before, so the session's state is undefined; call reset() or restore() first")

    def _check_fits(self, snapshot: Snapshot) -> None:
        if snapshot.fingerprint != self.bundle.fingerprint:
            raise InputError(
                f"snapshot of another model ({snapshot.name!r}, this is {self.bundle.name!r}) or other weights; use its own bundle"
            )
        if (snapshot.batch, snapshot.capacity) != (self.batch, self.capacity):
            raise InputError(
                f"snapshot of batch {snapshot.batch}, capacity {snapshot.capacity}, the session has batch {self.batch}, "
                f"capacity {self.capacity}; open a session of the same sizes"
            )
        mine = self._buffers.layout()
        given = {name: (array.shape, array.dtype.name) for name, array in snapshot.leaves.items()}
        position_B = snapshot.position_B
        if mine != given or position_B.shape != (self.batch,) or position_B.dtype != np.int64:
            raise InputError("snapshot with missing or misshapen state; it is damaged, save it again")
        if ((position_B < 0) | (position_B > self.capacity)).any():
            raise InputError(
                f"snapshot with positions {position_B.tolist()!s:.60} outside 0..{self.capacity}; it is damaged, save it again"
            )

    def _rows(self, rows: Any) -> Array:
        self._check_usable()
        return self._all_rows_B if rows is None else check_rows(rows, self.batch)

    def _advance(self, rows_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        """Run checked input, rows whose padding would exceed the capacity each at its own length, and move the positions."""
        length = tokens_BT.shape[1]
        spills_B = self._position_B[rows_B] + length > self.capacity
        if length and not spills_B.any():
            logits_BSV = self._run_rows(rows_B, tokens_BT, valid_B, select_BS)
        else:
            logits_BSV = np.zeros((*select_BS.shape, self.bundle.limits.vocab_size), np.float32)
            groups = [np.array([index]) for index in np.flatnonzero(spills_B)] + [np.flatnonzero(~spills_B)]
            for group in groups:
                own_length = int(valid_B[group].max(initial=0))
                if own_length:
                    part_BT = tokens_BT[group, :own_length]
                    logits_BSV[group] = self._run_rows(rows_B[group], part_BT, valid_B[group], select_BS[group])
        self._position_B[rows_B] += valid_B
        if not valid_B.all():
            logits_BSV[valid_B == 0] = 0.0
        return logits_BSV

    def _run_rows(self, rows_B: Array, tokens_BT: Array, valid_B: Array, select_BS: Array) -> Array:
        """Run rows in place where they are neighbours in order, on copies otherwise."""
        self._touched_B[rows_B] = True
        start, count = int(rows_B[0]), len(rows_B)
        neighbours = (count == 1 or bool((np.diff(rows_B) == 1).all())) and self._runs_from(start)
        buffers = self._buffers
        try:
            if not neighbours:
                if self._subset is None or self._subset.batch != count:
                    self._subset = None  # frees the old one first
                    self._subset = self._make_buffers(count)
                buffers, start = self._subset, 0
                buffers.gather(self._buffers, rows_B)
            logits_BSV = self._run(buffers, start, self._position_B[rows_B], tokens_BT, valid_B, select_BS)
            self._check_finite(logits_BSV, valid_B, rows_B)
            if not neighbours:
                buffers.scatter(self._buffers, rows_B)
        except WmError:
            raise
        except Exception as error:
            self._broken = True
            raise BundleError(
                f"{self.bundle.path}: {self.runtime} failed in a run: {first_line(error)}; the session's state is undefined, call reset()"
            ) from error
        return logits_BSV

    def _check_finite(self, logits_BSV: Array, valid_B: Array, rows_B: Array) -> None:
        """Refuse a result that no sound model gives. Positions have not moved, but the state behind them may hold the same NaN."""
        # max propagates NaN, so one pass finds it, +inf, and nothing but -inf; -inf for some tokens is fine.
        finite_BS = np.isfinite(logits_BSV.max(-1))
        if finite_BS.all():
            return
        bad_B = (valid_B > 0) & ~finite_BS.all(-1)
        if bad_B.any():
            self._broken = True
            raise CheckpointError(
                f"{self.bundle.path}: logits are not finite in row {rows_B[bad_B][0]}: the weights may hold NaN "
                f"or overflow {self.bundle.dtype}; repair the checkpoint and export it again"
            )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next one where it ends in a colon, for one-line messages."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
