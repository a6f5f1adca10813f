"""Checks of what users hand to a session, all before anything runs. B batch, T tokens, S selected tokens, V vocabulary."""

from typing import Any

import numpy as np

from wm_graph.errors import CapacityError, InputError

Array = np.ndarray[Any, np.dtype[Any]]


def integers(value: Any, what: str) -> Array:
    """`value` as an integer array.

    Raises:
        InputError: it is ragged, or holds anything but integers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{what}: not a rectangular array of integers ({error}); pad rows to one length and give `valid`") from error
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise InputError(f"{what}: dtype {array.dtype}, expected integers such as int64")
    return array


def check_rows(rows: Any, batch: int) -> Array:
    """Row numbers [B] int64: unique, 0..batch-1, at least one.

    Raises:
        InputError: they are not.
    """
    rows_B = integers(rows, "rows")
    if rows_B.ndim != 1 or not rows_B.size:
        raise InputError(f"rows: shape {list(rows_B.shape)}, expected a list of at least one row number")
    if outside := [int(row) for row in rows_B if not 0 <= row < batch]:
        raise InputError(f"rows: {outside[0]} is outside 0..{batch - 1}")
    if len(set(rows_B.tolist())) != len(rows_B):
        raise InputError(f"rows: {rows_B.tolist()} names a row twice; every row may run once per call")
    return rows_B.astype(np.int64)


def check_tokens(tokens: Any, batch: int) -> Array:
    """Tokens as [B, T]; one dimension is taken for a batch of 1.

    Raises:
        InputError: the shape does not fit.
    """
    tokens_BT = integers(tokens, "tokens")
    if tokens_BT.ndim == 1 and batch == 1:
        tokens_BT = tokens_BT[None]
    if tokens_BT.ndim != 2 or tokens_BT.shape[0] != batch:
        raise InputError(f"tokens: shape {list(tokens_BT.shape)}, expected [{batch}, T] for {batch} row{'s' * (batch > 1)}")
    return tokens_BT


def check_valid(valid: Any, batch: int, length: int) -> Array:
    """Valid lengths [B] int64 within 0..T; None means all of T.

    Raises:
        InputError: they are not.
    """
    if valid is None:
        return np.full(batch, length, np.int64)
    valid_B = integers(valid, "valid")
    if valid_B.shape != (batch,):
        raise InputError(f"valid: shape {list(valid_B.shape)}, expected [{batch}], one length per row")
    for row, count in enumerate(valid_B.tolist()):
        if not 0 <= count <= length:
            raise InputError(f"valid: {count} in row {row} is outside 0..{length}, the length of tokens")
    return valid_B.astype(np.int64)


def check_ids(tokens_BT: Array, valid_B: Array, vocab_size: int) -> Array:
    """Tokens as int64 with padding replaced by 0.

    Raises:
        InputError: a valid token is outside the vocabulary; the message names the first one and where it stands.
    """
    length = tokens_BT.shape[1]
    padding_BT = None
    if (valid_B < length).any():
        padding_BT = np.arange(length) >= valid_B[:, None]
    bad_BT = (tokens_BT < 0) | (tokens_BT >= vocab_size)
    if padding_BT is not None:
        bad_BT &= ~padding_BT
    if bad_BT.any():
        row, index = np.argwhere(bad_BT)[0].tolist()
        raise InputError(
            f"tokens: id {int(tokens_BT[row, index])} in row {row} at index {index} is outside 0..{vocab_size - 1}, the vocabulary"
        )
    ids_BT = tokens_BT.astype(np.int64)
    if padding_BT is not None:
        ids_BT[padding_BT] = 0
    return ids_BT


def check_select(select: Any, valid_B: Array) -> Array:
    """Indices [B, S] int64 of the tokens whose logits are wanted, each below its row's valid length; None means the last one.

    Raises:
        InputError: they are not.
    """
    if select is None:
        last_B1: Array = np.maximum(valid_B - 1, 0)[:, None]
        return last_B1
    select_BS = integers(select, "select")
    if select_BS.ndim != 2 or select_BS.shape[0] != len(valid_B) or not select_BS.shape[1]:
        raise InputError(f"select: shape {list(select_BS.shape)}, expected [{len(valid_B)}, S] with S of at least 1")
    bad_BS = (select_BS < 0) | (select_BS >= np.maximum(valid_B, 1)[:, None])
    if bad_BS.any():
        row, index = np.argwhere(bad_BS)[0].tolist()
        raise InputError(f"select: index {int(select_BS[row, index])} in row {row}, which has {int(valid_B[row])} valid tokens")
    return select_BS.astype(np.int64)


def check_room(position_B: Array, valid_B: Array, rows_B: Array, capacity: int) -> None:
    """Refuse what does not fit.

    Raises:
        CapacityError: position + valid exceeds the capacity in some row.
    """
    over_B = position_B + valid_B > capacity
    if over_B.any():
        index = int(np.argmax(over_B))
        raise CapacityError(
            f"row {int(rows_B[index])} holds {int(position_B[index])} tokens, {int(valid_B[index])} more exceed the capacity {capacity}; "
            "reset the row or open the session with a larger capacity"
        )
