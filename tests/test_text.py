import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from toy_bundle import make_toy_bundle, write_manifest
from wm_graph.errors import BundleError, CheckpointError, InputError
from wm_runtimes import ChatTemplate, StopMatcher, TextStream, Tokenizer, open_bundle
from wm_runtimes.bundle import TokenIds

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message['role'] not in ['user', 'assistant', 'system'] %}\n"
    "        {{ raise_exception('unknown role ' + message['role']) }}\n"
    "    {% endif %}\n"
    "{{ '<s>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "{{ '<s>assistant\\n' }}\n"
    "{% endif %}"
)


def byte_backend() -> Backend:
    """A byte-level tokenizer: one token per byte, 0 is <s>, 1 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def fallback_backend() -> Backend:
    """Words with a leading space mark and byte fallback, as SentencePiece models have."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a"]
    backend = Backend(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


IDS = TokenIds(bos=0, eos=1, pad=None, stop=(1,), add_bos=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers")
    byte_backend().save(str(path / "bytes.json"))
    fallback_backend().save(str(path / "fallback.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "bytes.json", IDS, CHATML)


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


# Tokens


@given(text=st.text())
def test_encode_then_decode_gives_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<s>", "").replace("</s>", "")


def test_bos_comes_when_the_manifest_or_the_caller_says_so(folder: Path, tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hi")
    assert tokenizer.encode("hi", add_bos=True) == [0, *plain]
    with_bos = Tokenizer(folder / "bytes.json", TokenIds(0, 1, None, (), True))
    assert with_bos.encode("hi") == [0, *plain]
    assert with_bos.encode("hi", add_bos=False) == plain
    with pytest.raises(InputError, match="no bos token"):
        Tokenizer(folder / "bytes.json", TokenIds(None, 1, None, (), False)).encode("hi", add_bos=True)


def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Tokenizer(tmp_path / "none.json", IDS)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"bad\.json: not a readable tokenizer"):
        Tokenizer(tmp_path / "bad.json", IDS)


def test_a_bundle_brings_its_tokenizer_or_says_that_it_has_none(tmp_path: Path, folder: Path) -> None:
    path = make_toy_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Tokenizer.from_bundle(open_bundle(path))
    (path / "tokenizer.json").write_bytes((folder / "bytes.json").read_bytes())
    write_manifest(
        path, {key: value for key, value in open_bundle(path).manifest.items() if key != "files"} | {"chat_template": "{{ bos_token }}x"}
    )
    tokenizer = Tokenizer.from_bundle(open_bundle(path))
    assert tokenizer.encode_chat([]) == [0, *tokenizer.encode("x")]


# Streams


@pytest.mark.parametrize("file", ["bytes.json", "fallback.json"])
@given(text=st.text(alphabet=st.sampled_from("ab ceé漢🙂\u0301\n"), max_size=20))
def test_streamed_pieces_join_to_the_decoded_text(folder: Path, file: str, text: str) -> None:
    tokenizer = Tokenizer(folder / file, IDS)
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer.stream(), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_whole_with_its_last_byte(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer.stream(), tokenizer.encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]


def test_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("é"), 1, *tokenizer.encode("x")]
    assert streamed(tokenizer.stream(), ids) == ["", "", "é", "", "x", ""]


def test_an_unfinished_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a漢")[:-1]
    assert streamed(tokenizer.stream(), ids) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    broken = tokenizer.encode("é")[:1] * 40
    assert "".join(stream.push(token) for token in broken).count("\ufffd") >= 17
    stream.finish()


# Stop strings


@given(
    text=st.text(alphabet="abc", max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_text_is_cut_at_the_first_stop_string_however_it_is_split(text: str, stops: list[str], cuts: list[int]) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    matcher = StopMatcher(stops)
    edges = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    pieces = [matcher.push(text[start:end]) for start, end in itertools.pairwise(edges)]
    assert matcher.stopped == bool(found)
    assert "".join(pieces) + matcher.finish() == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["</end>"])
    assert [matcher.push(piece) for piece in ("ab<", "/e", "x</", "end", "> more", "late")] == ["ab", "", "</ex", "", "", ""]
    assert matcher.stopped
    assert matcher.finish() == ""


def test_a_stream_ends_before_a_stop_string(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(["STOP"])
    assert "".join(streamed(stream, tokenizer.encode("one STOP two"))) == "one "
    assert stream.stopped
    held = tokenizer.stream(["STOP"])
    assert "".join(streamed(held, tokenizer.encode("one ST"))) == "one ST"
    assert not held.stopped


@pytest.mark.parametrize("stops", [[""], ["a", ""], [1]])
def test_an_empty_stop_string_is_refused(stops: list[Any]) -> None:
    with pytest.raises(InputError, match="stop strings"):
        StopMatcher(stops)


# Chat templates


def test_a_template_renders_with_trimmed_blocks(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi <&> {{ 7 * 7 }}"}, {"role": "assistant", "content": "ho"}]
    template = ChatTemplate(CHATML, "<s>", "</s>")
    assert template.render(messages, False) == "<s>user\nhi <&> {{ 7 * 7 }}</s>\n\n<s>assistant\nho</s>\n\n"
    assert template.render(messages[:1]).endswith("</s>\n\n<s>assistant\n\n")
    ids = tokenizer.encode_chat(messages[:1])
    assert ids[0] == 0
    assert ids.count(0) == 2


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(InputError, match="chat template: unknown role robot"):
        ChatTemplate(CHATML).render([{"role": "robot", "content": ""}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_broken_or_hostile_template_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(InputError, match="chat template: ") as caught:
        ChatTemplate(source).render([])
    assert "\n" not in str(caught.value)


def test_json_in_a_template_is_not_escaped_for_html() -> None:
    assert ChatTemplate("{{ messages[0] | tojson }}").render([{"role": "<é>", "content": 1}]) == '{"role": "<é>", "content": 1}'


@pytest.mark.parametrize("messages", [["hi"], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]])
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(InputError, match="message 0"):
        ChatTemplate(CHATML).render(messages)


def test_a_model_without_a_template_refuses_chat(folder: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(folder / "bytes.json", IDS).encode_chat([{"role": "user", "content": "hi"}])
