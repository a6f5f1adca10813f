"""Prompts into token ids, and tokens back into text as they come: the inner part of `wm generate`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wm_graph.errors import ConfigError, InputError
from wm_runtimes import Bundle, TextStream, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What to continue: its text, or None where ids were given, and its token ids."""

    text: str | None
    ids: list[int]


def open_text(bundle: Bundle, needed: bool) -> Tokenizer | None:
    """The bundle's tokenizer, or None where it has none and none is needed.

    Raises:
        BundleError: it is needed and the bundle has none.
    """
    return Tokenizer.from_bundle(bundle) if needed or "tokenizer.json" in bundle.files else None


def encode_prompts(
    bundle: Bundle,
    tokenizer: Tokenizer | None,
    texts: Sequence[str],
    files: Sequence[str],
    ids: Sequence[str],
    *,
    chat: bool,
    system: str | None,
) -> list[Prompt]:
    """Every prompt: texts, then files, then ids.

    Raises:
        ConfigError: there is none, or options contradict each other.
        InputError: a prompt cannot be read or has no tokens.
    """
    if system is not None and not chat:
        raise ConfigError("--system needs --chat")
    if chat and ids:
        raise ConfigError("--chat takes text; give --prompt or --prompt-file in place of --prompt-ids")
    prompts = [_encode(tokenizer, text, chat, system) for text in [*texts, *map(_read, files)]]
    prompts += [Prompt(None, _parse_ids(text)) for text in ids]
    if not prompts:
        raise ConfigError("nothing to continue; give --prompt TEXT, --prompt-file FILE or --prompt-ids IDS")
    for prompt in prompts:
        if not prompt.ids:
            raise InputError(f"the prompt {prompt.text!r} has no tokens, and this model starts texts with none; give some text")
    return prompts


def _encode(tokenizer: Tokenizer | None, text: str, chat: bool, system: str | None) -> Prompt:
    assert tokenizer is not None
    for part in (text, system or ""):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise InputError("the prompt is not valid UTF-8; check the terminal's encoding") from error
    if not chat:
        return Prompt(text, tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Prompt(text, tokenizer.encode_chat(messages))


def _read(file: str) -> str:
    try:
        return sys.stdin.buffer.read().decode() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text (byte {error.start}); convert it") from error


def _parse_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    for word in words:
        if not word.removeprefix("-").isdecimal() or len(word) > 18:
            raise InputError(f"--prompt-ids: {word[:40]!r} is no token id; expected integers separated by commas, such as 1,80,81")
    return [int(word) for word in words]


def stop_ids(bundle: Bundle, more: Sequence[int]) -> list[int]:
    """The ids that end a row: the model's own and the given ones.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    for token in more:
        if not 0 <= token < bundle.limits.vocab_size:
            raise InputError(f"--stop-id {token} is outside 0..{bundle.limits.vocab_size - 1}, the vocabulary")
    return [*bundle.tokens.stop, *more]


class Run:
    """One generation under way: takes the tokens as they come and prints them, at once or at the end.

    Args:
        prompts: what is continued.
        tokenizer: for text; None prints ids.
        stop: stop strings.
        streaming: print the first row's text as it comes.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer | None, stop: Sequence[str], streaming: bool) -> None:
        self._prompts = prompts
        self._streams: list[TextStream | _IdStream] = [_IdStream() if tokenizer is None else tokenizer.stream(stop) for _ in prompts]
        self._streaming = streaming
        self._texts = ["" for _ in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._first: float | None = None
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")

    def on_token(self, row: int, token: int) -> bool:
        """Take a token; whether the row ends here."""
        if self._first is None:
            self._first = time.perf_counter()
        self._tokens[row].append(token)
        self._give(row, self._streams[row].push(token))
        return self._streams[row].stopped

    def _give(self, row: int, text: str) -> None:
        self._texts[row] += text
        if self._streaming and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def print_rest(self, max_tokens: int, as_json: bool) -> None:
        """Print what was not streamed."""
        for row, stream in enumerate(self._streams):
            self._give(row, stream.finish())
        if as_json:
            for row in range(len(self._prompts)):
                print(json.dumps(self._record(row, max_tokens), ensure_ascii=False))
        elif self._streaming:
            print()
        else:
            for row, prompt in enumerate(self._prompts):
                shown = prompt.text if prompt.text is not None else ",".join(map(str, prompt.ids))
                print(f"{'' if row == 0 else chr(10)}=== {row + 1}: {' '.join(shown.split())[:100]}\n{self._texts[row]}")

    def _record(self, row: int, max_tokens: int) -> dict[str, object]:
        tokens = self._tokens[row]
        ended = "stop text" if self._streams[row].stopped else "length" if len(tokens) == max_tokens else "stop id"
        prompt = self._prompts[row]
        return {"prompt": prompt.text, "prompt_ids": prompt.ids, "text": self._texts[row], "tokens": tokens, "ended": ended}

    def speeds(self, ready: float, end: float) -> str:
        """Prefill and decode speed in words, all rows together."""
        first = end if self._first is None else self._first
        fed = sum(len(prompt.ids) for prompt in self._prompts)
        decoded = sum(max(0, len(tokens) - 1) for tokens in self._tokens)
        prefill = f"prefill {fed} tokens, {fed / max(first - ready, 1e-9):.1f} tok/s"
        return prefill + (f"; decode {decoded} tokens, {decoded / max(end - first, 1e-9):.1f} tok/s" if decoded else "")


class _IdStream:
    """Ids in place of text, for bundles without a tokenizer. There is no text to stop at."""

    stopped = False

    def __init__(self) -> None:
        self._separator = ""

    def push(self, token: int) -> str:
        """The id, after a space."""
        text, self._separator = f"{self._separator}{token}", " "
        return text

    def finish(self) -> str:
        """Nothing is held back."""
        return ""
