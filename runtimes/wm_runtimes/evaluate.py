"""Perplexity of a text in a session of any runtime, by length of context. numpy only.

B rows, T tokens fed in one call, S selected tokens, V vocabulary. A window is [W] token ids: W - 1 are fed, the last
is only predicted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wm_graph.errors import InputError
from wm_runtimes.bundle import Bundle
from wm_runtimes.json_values import json_values
from wm_runtimes.session import Array, Session

Progress = Callable[[str, float], None]
LONGEST_CONTEXT = 2048  # of a window where none is asked for
SHORTEST_BUCKET = 16  # of the default buckets: fewer tokens of context tell little, and each power of two less is one more row
LOGITS_AT_ONCE = 2**24  # float32 values of one call's logits: 64 MiB
LONGEST_PIECE = 512  # tokens of a row fed in one call, as in `generate`


@dataclass(frozen=True)
class Scores:
    """What a model says of the tokens of a window.

    Attributes:
        nats_S: -ln p(token | tokens before it in its window) of each scored token, float64; inf where the model excludes it.
        greedy_S: whether the token has the largest logit, the lowest id on ties; bool.
    """

    nats_S: Array
    greedy_S: Array


@dataclass(frozen=True)
class Likelihood:
    """How likely tokens are to a model.

    Attributes:
        tokens: how many tokens were scored.
        nats: sum of their negative log likelihoods, -ln p.
    """

    tokens: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """Mean negative log likelihood."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token) (Jelinek et al. 1977); inf where that overflows."""
        return perplexity(self.nats_per_token)


@dataclass(frozen=True)
class Bucket(Likelihood):
    """The tokens that were predicted from `first` to `last` tokens of context, bos counted.

    Attributes:
        first: least tokens of context.
        last: most tokens of context.
    """

    first: int
    last: int


@dataclass(frozen=True)
class Evaluation(Likelihood):
    """How well a model predicts a text: of its tokens all are scored, but without bos the first of each window.

    Attributes:
        text_bytes: bytes of the text in UTF-8.
        text_tokens: tokens of the text, bos apart.
        context: most tokens of text in a window.
        windows: how many windows there are.
        buckets: the scored tokens by length of context; they partition them, and none is empty.
    """

    text_bytes: int
    text_tokens: int
    context: int
    windows: int
    buckets: tuple[Bucket, ...]

    @property
    def bits_per_byte(self) -> float:
        """nats per token / ln 2 * text_tokens / text_bytes (Gao et al. 2020, The Pile): tokens that are not scored count as the mean."""
        return self.nats_per_token / math.log(2) * self.text_tokens / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; what is not finite becomes None."""
        names = ("text_bytes", "text_tokens", "context", "windows", "tokens", "nats_per_token", "perplexity", "bits_per_byte")
        inner = ("first", "last", "tokens", "nats_per_token", "perplexity")
        buckets = [{name: getattr(bucket, name) for name in inner} for bucket in self.buckets]
        values: dict[str, Any] = json_values({name: getattr(self, name) for name in names} | {"buckets": buckets})
        return values


def perplexity(nats_per_token: float) -> float:
    """exp(nats per token), Jelinek et al. 1977; inf where that overflows."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def evaluate_text(
    bundle: Bundle,
    text: str,
    runtime: str = "onnxruntime-cpu",
    context: int | None = None,
    batch: int = 8,
    edges: Sequence[int] | None = None,
    piece: int | None = None,
    progress: Progress = lambda text, fraction: None,
) -> Evaluation:
    """Perplexity of a text, cut into windows, each scored from an empty state.

    Args:
        bundle: the bundle, with a tokenizer.
        text: the text; the tokenizer's rule says whether every window begins with bos.
        runtime: a runtime, or one of its ways, as `wm_runtimes.labels` names them.
        context: tokens of text in a window, bos apart; None means what the model's positions allow, at most `LONGEST_CONTEXT`.
        batch: most windows to run side by side.
        edges: rising ends of the buckets, in tokens of context; what lies past the last is a bucket too. None means powers of two.
        piece: most tokens of a window to feed at once; None means what memory allows.
        progress: called with (what is being done, fraction done).

    Raises:
        InputError: the text has too few tokens, or an argument is out of range.
        BundleError: the bundle has no tokenizer.
        RuntimeUnavailableError: the runtime cannot run here, or cannot run this bundle.
    """
    from wm_runtimes.labels import open_labelled
    from wm_runtimes.text import Tokenizer

    context = check_context(bundle, context)
    edges = default_edges(context) if edges is None else check_edges(edges)
    ids = Tokenizer.from_bundle(bundle).encode(text, add_bos=False)
    windows = cut_windows(ids, context, bundle.tokens.bos if bundle.tokens.add_bos else None)
    with open_labelled(bundle, runtime, min(batch, len(windows)), max(map(len, windows)) - 1) as session:
        scores = score_windows(session, windows, piece=piece, progress=progress)
    nats = [score.nats_S for score in scores]
    tokens = sum(map(len, nats))
    total = math.fsum(map(np.sum, nats))
    return Evaluation(tokens, total, len(text.encode()), len(ids), context, len(windows), fill_buckets(nats, edges))


def check_context(bundle: Bundle, context: int | None) -> int:
    """The length of a window.

    Raises:
        InputError: it is below 2, or the model has fewer positions.
    """
    positions = bundle.limits.max_position
    if context is None:
        return min(positions, LONGEST_CONTEXT)
    if not 2 <= context <= positions:
        raise InputError(f"context of {context} tokens, expected 2..{positions}, the positions of {bundle.name}")
    return context


def check_edges(edges: Sequence[int]) -> tuple[int, ...]:
    """Ends of buckets.

    Raises:
        InputError: there is none, or they do not rise from at least 1.
    """
    steps = zip((0, *edges), edges, strict=False)
    if not edges or any(after <= before for before, after in steps):
        raise InputError(f"buckets: {','.join(map(str, edges)) or 'none'}, expected rising lengths of at least 1, such as 128,512,2048")
    return tuple(edges)


def default_edges(context: int) -> tuple[int, ...]:
    """Powers of two, from `SHORTEST_BUCKET` up to the context."""
    return tuple(2**power for power in range(SHORTEST_BUCKET.bit_length() - 1, context.bit_length())) or (context,)


def cut_windows(ids: Sequence[int], context: int, bos: int | None = None) -> list[Array]:
    """A text's ids as windows of `context` tokens, the last of what is left; each begins with bos if one is given.

    Windows do not overlap, and one that holds nothing to predict, a single token without bos, is left out.

    Raises:
        InputError: no window holds a token to predict.
    """
    head = [] if bos is None else [bos]
    pieces = [np.array([*head, *ids[start : start + context]], np.int64) for start in range(0, len(ids), context)]
    windows = [window for window in pieces if len(window) > 1]
    if not windows:
        raise InputError(f"the text has {len(ids)} token{'s' * (len(ids) != 1)}, expected at least {2 - len(head)}; give a longer one")
    return windows


def fill_buckets(nats: Sequence[Array], edges: Sequence[int]) -> tuple[Bucket, ...]:
    """Sums by length of context: entry i of a window's nats was predicted from i + 1 tokens."""
    longest = max(map(len, nats))
    sums, counts = np.zeros(longest), np.zeros(longest, np.int64)
    for nats_S in nats:
        sums[: len(nats_S)] += nats_S
        counts[: len(nats_S)] += 1
    ends = [*(edge for edge in edges if edge < longest), longest]
    starts = [0, *ends[:-1]]
    return tuple(
        Bucket(int(counts[start:end].sum()), float(sums[start:end].sum()), start + 1, end) for start, end in zip(starts, ends, strict=True)
    )


def score_windows(
    session: Session,
    windows: Sequence[Array],
    first: Sequence[int] | None = None,
    piece: int | None = None,
    progress: Progress = lambda text, fraction: None,
) -> list[Scores]:
    """Log likelihoods of the tokens of windows, each from an empty state, as many side by side as the session has rows.

    The logits of one call are at most `LOGITS_AT_ONCE` values, or B * V where that is more. Rows that were used are empty afterwards.

    Args:
        session: where to run; its capacity is at least the longest window less one.
        windows: token ids [W], W of at least 2.
        first: index, at least 1, of the first token of each window to score; None means 1, all that have a token before them.
        piece: most tokens of a window to feed at once; None means what the bound allows.
        progress: called with (what is being done, fraction done).

    Returns:
        Scores of each window's tokens from `first` on: S = W - first.

    Raises:
        InputError: a token is outside the vocabulary, or `piece` below 1.
        CapacityError: a window does not fit into the session.
        CheckpointError: logits are not finite.
    """
    if piece is not None and piece < 1:
        raise InputError(f"piece is {piece}, expected at least 1")
    firsts = [1] * len(windows) if first is None else list(first)
    found: list[Scores] = []
    for start in range(0, len(windows), session.batch):
        progress(f"window {start + 1} of {len(windows)}", start / len(windows))
        group = slice(start, start + session.batch)
        found += _score_rows(session, windows[group], firsts[group], piece)
    return found


def _score_rows(session: Session, windows: Sequence[Array], firsts: Sequence[int], piece: int | None) -> list[Scores]:
    """Scores of at most as many windows as the session has rows, fed in right-padded pieces."""
    most = LOGITS_AT_ONCE // (len(windows) * session.bundle.limits.vocab_size)
    step = max(1, min(most, LONGEST_PIECE if piece is None else piece))
    fed_B = np.array([len(window) - 1 for window in windows])
    parts: list[list[Scores]] = [[] for _ in windows]
    session.reset(range(len(windows)))
    for start in range(0, int(fed_B.max()), step):
        rows = np.flatnonzero(fed_B > start)
        for row, scores in zip(rows, _score_piece(session, windows, firsts, rows, start, step), strict=True):
            parts[row].append(scores)
    session.reset(range(len(windows)))
    return [Scores(*(np.concatenate([getattr(part, name) for part in row]) for name in ("nats_S", "greedy_S"))) for row in parts]


def _score_piece(session: Session, windows: Sequence[Array], firsts: Sequence[int], rows: Array, start: int, step: int) -> list[Scores]:
    """Feed tokens start..start+step-1 of some windows; scores of the tokens that follow each of them."""
    chosen = [windows[row] for row in rows]
    valid_B = np.array([min(len(window) - 1 - start, step) for window in chosen])
    tokens_BT = np.zeros((len(rows), int(valid_B.max())), np.int64)
    for index, (window, valid) in enumerate(zip(chosen, valid_B, strict=True)):
        tokens_BT[index, :valid] = window[start : start + valid]
    # The token at index i of a window is predicted from the logits after index i - 1. A row with none to score selects one all the same.
    skip_B = np.clip([firsts[row] - 1 - start for row in rows], 0, valid_B)
    select_BS = np.minimum(skip_B[:, None] + np.arange(max(1, int((valid_B - skip_B).max()))), valid_B[:, None] - 1)
    logits_BSV = session.prefill(tokens_BT, valid_B, rows, select_BS)
    return [
        score_logits(logits_SV[: valid - skip], window[start + skip + 1 : start + valid + 1])
        for logits_SV, window, valid, skip in zip(logits_BSV, chosen, valid_B, skip_B, strict=True)
    ]


def score_logits(logits_SV: Array, token_S: Array) -> Scores:
    """-ln softmax(logits)[token] = max + ln sum exp(logits - max) - logits[token], in float64.

    Args:
        logits_SV: logits, finite or -inf.
        token_S: the tokens that came.
    """
    most_S1 = logits_SV.max(-1, keepdims=True).astype(np.float64)
    shifted_SV = logits_SV - most_S1
    came_S = np.take_along_axis(shifted_SV, token_S[:, None], -1)[:, 0]
    np.exp(shifted_SV, out=shifted_SV)
    return Scores(np.log(shifted_SV.sum(-1)) - came_S, logits_SV.argmax(-1) == token_S)
