"""Generation: prompts of any lengths as one batch, each row until its own end. B batch, T tokens, V vocabulary."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from wm_graph.errors import CapacityError, InputError
from wm_runtimes.inputs import integers
from wm_runtimes.sampling import SamplingOptions, row_generators, sample
from wm_runtimes.session import Array, Session

OnToken = Callable[[int, int], Any]


def generate(
    session: Session,
    prompts: Any,
    max_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_ids: Iterable[int] | None = None,
    on_token: OnToken | None = None,
    chunk: int = 512,
    reset: bool = True,
) -> list[list[int]]:
    """Continue prompts, prompt i in row i of the session.

    A row's tokens depend on its prompt, the options, the seed and its number, never on the other rows. Afterwards a row has seen its
    prompt and its tokens except the last chosen one, whatever that was. Rows without a prompt are left alone.

    Args:
        session: where to run; prompts may be fewer than its rows.
        prompts: non-empty lists of token ids, of any lengths.
        max_tokens: most tokens to choose per row.
        temperature: see `SamplingOptions`; 0 is greedy.
        top_k: see `SamplingOptions`.
        top_p: see `SamplingOptions`.
        seed: start of the random numbers; None draws one.
        stop_ids: ids that end a row; they are not returned. None means the bundle's.
        on_token: called as on_token(row, token) for every returned token in order; returning True ends that row after this token.
        chunk: longest piece of a prompt to run at once, which bounds memory.
        reset: empty the rows first; False continues what they have seen.

    Returns:
        The chosen tokens of each row.

    Raises:
        InputError: a prompt or option is malformed; nothing has run.
        CapacityError: a prompt and max_tokens do not fit into the capacity; nothing has run.
        CheckpointError: logits are not finite.
    """
    options = SamplingOptions(temperature, top_k, top_p)
    for name, value, least in (("max_tokens", max_tokens, 0), ("chunk", chunk, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} is {value!r}, expected an integer of at least {least}")
    ids = _check_prompts(session, prompts, int(max_tokens), reset)
    stops = frozenset(integers(list(stop_ids), "stop_ids").tolist() if stop_ids is not None else session.bundle.tokens.stop)
    # numpy.random takes a while to load, and greedy choice needs none of it.
    generators = row_generators(seed, len(ids)) if options.temperature > 0.0 else None
    rows = list(range(len(ids)))
    if reset:
        session.reset(rows)
    logits_BV = _prefill(session, ids, int(chunk))
    return _Loop(session, options, generators, stops, on_token).run(logits_BV, int(max_tokens))


def _check_prompts(session: Session, prompts: Any, max_tokens: int, reset: bool) -> list[Array]:
    """Prompts as arrays of ids in range that fit into the session."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray) or not 1 <= len(prompts) <= session.batch:
        raise InputError(f"prompts: expected 1..{session.batch} lists of token ids, one per row of the session")
    ids = []
    for row, prompt in enumerate(prompts):
        array = integers(prompt, f"prompt {row}")
        if array.ndim != 1 or not array.size:
            raise InputError(f"prompt {row}: shape {list(array.shape)}, expected a list of at least one token id")
        bad = (array < 0) | (array >= session.bundle.limits.vocab_size)
        if bad.any():
            index = int(np.argmax(bad))
            raise InputError(f"prompt {row}: id {int(array[index])} at index {index} is outside 0..{session.bundle.limits.vocab_size - 1}")
        ids.append(array.astype(np.int64))
    for row, (array, position) in enumerate(zip(ids, session.position.tolist(), strict=False)):
        needed = (0 if reset else position) + len(array) + max(max_tokens - 1, 0)
        if needed > session.capacity:
            raise CapacityError(
                f"prompt {row}: {len(array)} tokens and {max_tokens} new ones need a capacity of {needed}, not {session.capacity}; "
                "open the session with more, or lower max_tokens"
            )
    return ids


def _prefill(session: Session, ids: list[Array], chunk: int) -> Array:
    """Feed the prompts in right-padded pieces; logits [B, V] after each prompt's last token."""
    lengths_B = np.array([len(prompt) for prompt in ids])
    tokens_BT = np.zeros((len(ids), int(lengths_B.max())), np.int64)
    for row, prompt in enumerate(ids):
        tokens_BT[row, : len(prompt)] = prompt
    logits_BV = np.zeros((len(ids), session.bundle.limits.vocab_size), np.float32)
    for start in range(0, tokens_BT.shape[1], chunk):
        # Lengths differ: the rows of a later piece are those with tokens left.
        rows = np.flatnonzero(lengths_B > start)
        valid_B = np.minimum(lengths_B[rows] - start, chunk)
        piece_BV = session.prefill(tokens_BT[rows, start : start + chunk], valid_B, rows)[:, 0]
        logits_BV[rows] = piece_BV
    return logits_BV


class _Loop:
    """Choose, report, feed back, until every row has ended."""

    def __init__(
        self,
        session: Session,
        options: SamplingOptions,
        generators: list[np.random.Generator] | None,
        stops: frozenset[int],
        on_token: OnToken | None,
    ) -> None:
        self.session = session
        self.options = options
        self.generators = generators
        self.stops = stops
        self.on_token = on_token
        # slots[i] is the row whose state lies in the session's row i.
        self.slots = list(range(session.batch))

    def run(self, logits_BV: Array, max_tokens: int) -> list[list[int]]:
        """Tokens per row, starting from the logits after the prompts."""
        chosen: list[list[int]] = [[] for _ in range(len(logits_BV))]
        live = list(range(len(logits_BV)))
        try:
            for step in range(max_tokens):
                fed = [row for row, logits_V in zip(live, logits_BV, strict=True) if self._choose(row, logits_V, chosen[row])]
                if not fed or step + 1 == max_tokens:
                    break
                live = fed
                logits_BV = self._feed(live, np.array([chosen[row][-1] for row in live]))
        finally:
            self._restore_order()
        return chosen

    def _choose(self, row: int, logits_V: Array, chosen: list[int]) -> bool:
        """Choose a row's token; whether the row goes on."""
        token = sample(logits_V, self.options, None if self.generators is None else self.generators[row])
        if token in self.stops:
            return False
        chosen.append(token)
        return self.on_token is None or self.on_token(row, token) is not True

    def _feed(self, live: list[int], tokens_B: Array) -> Array:
        if self.slots[: len(live)] != live:
            self._move(live + [row for row in self.slots if row not in live])
        return self.session.decode(tokens_B, range(len(live)))

    def _move(self, order: list[int]) -> None:
        """Reorder the session's rows; live rows at the front run in place, scattered ones would be copied at every step."""
        where = {row: slot for slot, row in enumerate(self.slots)}
        self.session.permute([where[row] for row in order])
        self.slots = order

    def _restore_order(self) -> None:
        if self.slots != sorted(self.slots):
            self._move(sorted(self.slots))
