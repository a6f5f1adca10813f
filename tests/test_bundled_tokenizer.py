import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from wm_graph.data import tokenizer_path
from wm_graph.data.make_tokenizer import SPECIAL, byte_characters, make_tokenizer

TOKENIZER = Tokenizer.from_file(str(tokenizer_path()))


def test_file_is_what_the_script_makes():
    assert json.loads(tokenizer_path().read_text(encoding="utf-8")) == json.loads(make_tokenizer().to_str())


def test_byte_characters_are_256_distinct_characters():
    assert len(set(byte_characters())) == 256


@given(st.text())
@example("<bos>a <eos>\x00<pad>")
def test_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_characters="<")))
def test_token_is_three_plus_byte(text):
    assert TOKENIZER.encode(text).ids == [3 + byte for byte in text.encode()]


@pytest.mark.parametrize(("index", "text"), list(enumerate(SPECIAL)))
def test_special_tokens_are_the_first_ids(index, text):
    assert TOKENIZER.token_to_id(text) == index
    assert TOKENIZER.encode(f"a{text}b").ids == [3 + ord("a"), index, 3 + ord("b")]
    assert TOKENIZER.decode([3 + ord("a"), index]) == "a"


def test_vocabulary_is_the_specials_and_the_bytes():
    assert TOKENIZER.get_vocab_size() == 3 + 256
