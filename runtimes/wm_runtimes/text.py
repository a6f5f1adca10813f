"""Text in and out: tokenizer.json, text as it is generated, stop strings. tokenizers and jinja2 load on first use."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wm_graph.errors import BundleError, CheckpointError, InputError
from wm_runtimes.bundle import Bundle, TokenIds
from wm_runtimes.chat import ChatTemplate, Message

__all__ = ["ChatTemplate", "StopMatcher", "TextStream", "Tokenizer"]

_REPLACEMENT = "\ufffd"
# No character is spread over more tokens than this; beyond it the bytes are simply no text.
_MOST_PENDING = 16


class Tokenizer:
    """A `tokenizer.json` with the special tokens of a manifest.

    Args:
        file: the tokenizer.json.
        tokens: special token ids; `add_bos` says whether a text starts with bos.
        chat_template: Jinja template of conversations, or None.

    Raises:
        CheckpointError: the file is missing or damaged.
    """

    def __init__(self, file: Path, tokens: TokenIds, chat_template: str | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; text needs a tokenizer.json")
        try:
            self._backend: Any = Backend.from_file(str(file))
        except Exception as error:
            raise CheckpointError(f"{file}: not a readable tokenizer ({str(error)[:200]}); fetch it again") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.tokens = tokens
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, self._text_of(tokens.bos), self._text_of(tokens.eos))
        )

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> "Tokenizer":
        """The tokenizer of a bundle.

        Raises:
            BundleError: the bundle has none.
            CheckpointError: it is damaged.
        """
        if "tokenizer.json" not in bundle.files:
            raise BundleError(
                f"{bundle.path}: the bundle has no tokenizer.json; put one beside the checkpoint and export again, or use token ids"
            )
        return cls(bundle.file("tokenizer.json"), bundle.tokens, bundle.chat_template)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
            text: any text; the names of special tokens in it become those tokens.
            add_bos: start with bos; None does what the manifest says.

        Raises:
            InputError: bos is wanted but the model has none.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not (self.tokens.add_bos if add_bos is None else add_bos):
            return ids
        if self.tokens.bos is None:
            raise InputError("add_bos: this model has no bos token; encode without it")
        return [self.tokens.bos, *ids]

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation as the model's chat template writes it; bos is the template's business.

        Args:
            messages: dictionaries with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            InputError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template; give it plain text")
        return self.encode(self.chat_template.render(messages, add_generation_prompt), add_bos=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, stop: Iterable[str] = ()) -> "TextStream":
        """Text of ids that come one at a time, up to a stop string."""
        return TextStream(self, stop)

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self._backend.id_to_token(token) or ""


class TextStream:
    """Turns ids into text as they come: whole characters only, nothing of a stop string or past it.

    The pieces joined are the decoded text, cut before the stop string.

    Args:
        tokenizer: the tokenizer.
        stop: stop strings.

    Attributes:
        stopped: whether a stop string has come; later ids are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._matcher = StopMatcher(stop)
        # ids[:given] are in text already; ids before `context` no longer matter to how the next ones decode.
        self._ids: list[int] = []
        self._context = self._given = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """The text that this id completes, often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._matcher.push(self._new_text(flush=len(self._ids) - self._given > _MOST_PENDING))

    def finish(self) -> str:
        """What was held back; call it once, at the end."""
        return "" if self.stopped else self._matcher.push(self._new_text(flush=True)) + self._matcher.finish()

    def _new_text(self, flush: bool) -> str:
        # Decoding from a few ids back keeps spaces between words, which decoders drop at the start of a text.
        before = self._tokenizer.decode(self._ids[self._context : self._given])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) <= len(before) or (text.endswith(_REPLACEMENT) and not flush):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text[len(before) :]


class StopMatcher:
    """Passes text on until a stop string, holding back what may be the beginning of one.

    The first stop string to be complete counts, the longer one if two end together, however the text is cut into pieces.

    Args:
        stops: non-empty strings.

    Attributes:
        stopped: whether a stop string has come; later text is ignored.

    Raises:
        InputError: a stop string is empty or no string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise InputError(f"stop strings: {self._stops!r:.60}, expected non-empty strings")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can be passed on now."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        hold = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
