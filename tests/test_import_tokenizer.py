import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from import_sources import byte_vocabulary, make_llama, tokenizer_of, write_gguf
from wm_graph.errors import CheckpointError
from wm_graph.importers import import_source

VOCAB = {"vocab_size": 320, "num_hidden_layers": 1}


def write_vocabulary(tmp_path, vocabulary):
    return write_gguf(tmp_path / "model.gguf", make_llama(**VOCAB), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ve", "Ġ", "Ġ1234", "ĠX", "!?", "ĊĊ"]),
        ("default", ["I", "'ve", "Ġ", "Ġ1234", "ĠX", "!?", "ĊĊ"]),
        ("smollm", ["I", "'ve", "ĠĠ", "1", "2", "3", "4", "ĠX", "!?", "ĊĊ"]),
        ("llama-bpe", ["I", "'ve", "Ġ", "Ġ", "123", "4", "ĠX", "!?ĊĊ"]),
        ("qwen2", ["I", "'ve", "Ġ", "Ġ", "1", "2", "3", "4", "ĠX", "!?ĊĊ"]),
    ],
)
def test_text_is_split_as_the_pre_tokenizer_of_that_name_does(pre, pieces, tmp_path):
    tokenizer = tokenizer_of(write_vocabulary(tmp_path, byte_vocabulary(pre)))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I've  1234 X!?\n\n")] == pieces


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def byte_tokenizer(request, tmp_path_factory):
    return tokenizer_of(write_vocabulary(tmp_path_factory.mktemp("gguf"), byte_vocabulary(request.param, ["Ġ t", "h e", "Ġt he", "1 2"])))


@given(text=st.text(st.characters(exclude_characters="<")))
def test_byte_level_text_round_trips(byte_tokenizer, text):
    normal = text if byte_tokenizer.normalizer is None else byte_tokenizer.normalizer.normalize_str(text)
    assert byte_tokenizer.decode(byte_tokenizer.encode(text).ids, skip_special_tokens=False) == normal


def test_merges_join_in_their_order(tmp_path):
    tokenizer = tokenizer_of(write_vocabulary(tmp_path, byte_vocabulary("gpt-2", ["Ġ t", "h e", "Ġt he"])))
    assert tokenizer.encode(" the theme").tokens == ["Ġthe", "Ġthe", "m", "e"]


def test_llama_3_takes_a_known_word_whole_where_merges_do_not_lead_to_it(tmp_path):
    merges = ["b c", "a b", "ab c"]
    whole = tokenizer_of(write_vocabulary(tmp_path, byte_vocabulary("llama-bpe", merges)))
    merged = tokenizer_of(write_vocabulary(tmp_path, byte_vocabulary("gpt-2", merges)))
    assert (whole.encode("abc").tokens, merged.encode("abc").tokens) == (["abc"], ["a", "bc"])


def test_control_tokens_are_found_in_text_and_left_out_of_decoded_text(tmp_path):
    tokenizer = tokenizer_of(write_vocabulary(tmp_path, byte_vocabulary("smollm")))
    ids = tokenizer.encode("<|im_start|>a").ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a"


def test_gguf_ids_and_template_become_generation_settings(tmp_path):
    vocabulary = byte_vocabulary(
        "gpt-2",
        specials=("<s>", "</s>", "<|im_end|>"),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        add_bos_token=True,
        chat_template="{{ x }}",
    )
    assert import_source(write_vocabulary(tmp_path, vocabulary)).generation == {
        "tokens": {"bos": 0, "eos": 1, "pad": 1, "stop": [1, 2], "add_bos": True},
        "chat_template": "{{ x }}",
    }


def test_gguf_without_vocabulary_has_no_tokenizer(tmp_path):
    imported = import_source(write_gguf(tmp_path / "model.gguf", make_llama()))
    assert imported.tokenizer_json is None
    assert imported.generation == {"tokens": {"bos": None, "eos": None, "pad": None, "stop": [], "add_bos": False}, "chat_template": None}


PIECES = ["▁", "t", "h", "e", "m", "a", "▁t", "he", "▁the", "me", "the", "▁a", "th"]


def sentencepiece_vocabulary(writer):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [float(-index) for index in range(len(PIECES))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.fixture(scope="module")
def sentencepiece_source(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("gguf"), sentencepiece_vocabulary)


@pytest.mark.parametrize("text", ["the theme", "a math", "hat  the  ", "metheheme", "é the €", "tea\n\tham", "▁the"])
def test_sentencepiece_ids_are_those_of_transformers(sentencepiece_source, text):
    reference = AutoTokenizer.from_pretrained(sentencepiece_source.parent, gguf_file=sentencepiece_source.name)
    assert tokenizer_of(sentencepiece_source).encode(text).ids == reference(text, add_special_tokens=False).input_ids


@given(text=st.text(st.characters(exclude_characters="<▁")))
def test_sentencepiece_text_round_trips(sentencepiece_tokenizer, text):
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode(text).ids) == text


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(sentencepiece_source):
    return tokenizer_of(sentencepiece_source)


def test_sentencepiece_prompts_begin_with_bos_unless_the_file_says_otherwise(sentencepiece_source):
    assert import_source(sentencepiece_source).generation["tokens"] == {"bos": 1, "eos": 2, "pad": None, "stop": [2], "add_bos": True}


@pytest.mark.parametrize(
    ("vocabulary", "line"),
    [
        (byte_vocabulary("tekken"), "tokenizer.ggml.pre is 'tekken'"),
        (byte_vocabulary("gpt-2", ["Ġt"]), "tokenizer.ggml.merges holds 'Ġt'"),
        (byte_vocabulary("gpt-2", ["ab c"]), "the vocabulary makes no tokenizer"),
        (byte_vocabulary("gpt-2", specials=[f"<{index}>" for index in range(100)]), "has 357 tokens; expected at most the model's 320"),
        (byte_vocabulary("gpt-2", eos_token_id=320), "eos_token_id is 320"),
        (byte_vocabulary("gpt-2", add_bos_token=True), "expected bos_token_id"),
        (lambda writer: writer.add_tokenizer_model("bert"), "tokenizer.ggml.model is 'bert'"),
        (lambda writer: writer.add_tokenizer_model("gpt2"), "'tokenizer.ggml.tokens' is missing"),
    ],
)
def test_unusable_vocabulary_is_refused(vocabulary, line, tmp_path):
    with pytest.raises(CheckpointError, match=line):
        import_source(write_vocabulary(tmp_path, vocabulary))


def folder_tokenizer(with_bos):
    vocab = {"<s>": 0, "</s>": 1, "<|eot_id|>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in list(vocab)[:3]])
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def write_folder(folder, tokenizer, **files):
    make_llama(bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("with_bos", [True, False])
def test_folder_says_whether_prompts_begin_with_bos(with_bos, tmp_path):
    write_folder(tmp_path, folder_tokenizer(with_bos))
    assert import_source(tmp_path).generation["tokens"]["add_bos"] is with_bos
    write_folder(tmp_path, folder_tokenizer(with_bos), tokenizer_config={"add_bos_token": not with_bos})
    assert import_source(tmp_path).generation["tokens"]["add_bos"] is not with_bos


def test_folder_stops_at_every_eos_of_generation_config_and_at_end_of_turn(tmp_path):
    write_folder(tmp_path, folder_tokenizer(False), generation_config={"eos_token_id": [1, 4], "bos_token_id": 0, "pad_token_id": -1})
    assert import_source(tmp_path).generation["tokens"] == {"bos": 0, "eos": 1, "pad": None, "stop": [1, 4, 2], "add_bos": False}


def test_folder_keeps_the_text_of_tokenizer_json(tmp_path):
    write_folder(tmp_path, folder_tokenizer(True))
    assert import_source(tmp_path).tokenizer_json == (tmp_path / "tokenizer.json").read_text()


@pytest.mark.parametrize("template", ["{{ x }}", [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ x }}"}]])
def test_folder_template_is_found(template, tmp_path):
    write_folder(tmp_path, folder_tokenizer(False), tokenizer_config={"chat_template": template})
    assert import_source(tmp_path).generation["chat_template"] == "{{ x }}"


def test_template_file_comes_before_tokenizer_config(tmp_path):
    write_folder(tmp_path, folder_tokenizer(False), tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert import_source(tmp_path).generation["chat_template"] == "new"
