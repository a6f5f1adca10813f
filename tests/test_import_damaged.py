"""Damaged and unsupported sources: one CheckpointError line that names the culprit, and nothing written."""

import builtins
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cli_support import wm
from import_sources import byte_vocabulary, convert, gguf_tensors, make_doge, make_llama, write_gguf
from wm_graph.errors import CheckpointError, RuntimeUnavailableError
from wm_graph.importers import import_source


def assert_refused(source, *words, error=CheckpointError):
    """`source` is refused in one line holding all `words`, and no file or folder appears beside it."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(source, source.parent / "made")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message
    assert sorted(source.parent.iterdir()) == before


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    model = make_llama(vocab_size=300, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "good.gguf", model, "Q8_0", vocabulary=byte_vocabulary("smollm", ["h e"])
    ).read_bytes()


def write_bytes(folder, data):
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("part", [0, 3, 4, 10, 24, 60, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_truncated_gguf_is_refused(part, gguf_bytes, tmp_path):
    length = part if isinstance(part, int) else int(part * len(gguf_bytes))
    assert_refused(write_bytes(tmp_path, gguf_bytes[:length]), "GGUF")


def test_gguf_missing_its_last_byte_is_refused(gguf_bytes, tmp_path):
    padding = len(gguf_bytes) - len(gguf_bytes.rstrip(b"\0"))
    assert_refused(write_bytes(tmp_path, gguf_bytes[: len(gguf_bytes) - padding - 32]), "truncated")


def test_flipped_magic_is_refused(gguf_bytes, tmp_path):
    assert_refused(write_bytes(tmp_path, b"GGUX" + gguf_bytes[4:]), "b'GGUX'", "b'GGUF'")


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (99, "version 99"), (3 << 24, "big-endian")])
def test_other_gguf_versions_are_refused(version, word, gguf_bytes, tmp_path):
    assert_refused(write_bytes(tmp_path, gguf_bytes[:4] + version.to_bytes(4, "little") + gguf_bytes[8:]), word)


@pytest.mark.parametrize("offset", [8, 16, 24], ids=["tensor count", "key count", "key length"])
def test_absurd_counts_are_refused_at_once(offset, gguf_bytes, tmp_path):
    assert_refused(write_bytes(tmp_path, gguf_bytes[:offset] + b"\xff" * 8 + gguf_bytes[offset + 8 :]), "truncated or damaged")


def test_absurd_array_length_is_refused_at_once(gguf_bytes, tmp_path):
    at = gguf_bytes.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    assert_refused(write_bytes(tmp_path, gguf_bytes[:at] + b"\xff" * 8 + gguf_bytes[at + 8 :]), "tokenizer.ggml.token_type")


@given(st.data())
def test_flipped_header_bytes_are_refused_or_harmless(gguf_bytes, tmp_path_factory, data):
    header = gguf_bytes.index(b"output_norm.weight")
    damaged = bytearray(gguf_bytes)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header))] ^= data.draw(st.integers(1, 255))
    message = ""
    try:
        import_source(write_bytes(tmp_path_factory.mktemp("flipped"), bytes(damaged)))
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.block_count": None}, ["llama.block_count", "missing"]),
        ({"llama.block_count": 3}, ["llama.block_count is 3", "2 layers"]),
        ({"llama.embedding_length": "wide"}, ["'wide'", "whole number"]),
        ({"llama.embedding_length": 64, "llama.rope.dimension_count": 16}, ["token_embd.weight", "[96, 32]", "[96, 64]"]),
        ({"llama.attention.head_count": 0, "llama.rope.dimension_count": None}, ["n_head is 0"]),
        ({"llama.attention.head_count_kv": 3}, ["not a multiple"]),
        ({"llama.attention.head_count_kv": [2, 4]}, ["llama.attention.head_count_kv", "[2, 4]"]),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, ["norm_eps is nan"]),
        ({"llama.rope.dimension_count": 4}, ["llama.rope.dimension_count is 4", "expected 8"]),
        ({"llama.rope.scaling.type": "yarn"}, ["llama.rope.scaling.type is 'yarn'", "'linear'"]),
        ({"llama.expert_count": 8}, ["llama.expert_count is 8"]),
        ({"llama.vocab_size": 95}, ["llama.vocab_size is 95", "expected 96"]),
        ({"llama.attention.sliding_window": 4096}, ["llama.attention.sliding_window is 4096"]),
        ({"split.count": 2}, ["one of 2 parts"]),
        ({"general.alignment": 24}, ["general.alignment is 24"]),
    ],
    ids=lambda value: next(iter(value.values()), None).__repr__() if isinstance(value, dict) else None,
)
def test_gguf_metadata_that_makes_another_model_is_refused(metadata, words, tmp_path):
    assert_refused(write_gguf(tmp_path / "model.gguf", make_llama(), metadata=metadata), *words)


def test_other_gguf_architecture_is_refused(gguf_bytes, tmp_path):
    assert_refused(
        write_bytes(tmp_path, gguf_bytes.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1)), "'gemma'", "'llama'"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blk.1.ffn_up.weight": None}, ["'blk.1.ffn_up.weight' is missing", "[64, 32]"]),
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, ["'blk.0.attn_q.bias' is unknown"]),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, ["'rope_freqs.weight'"]),
        ({"output_norm.weight": np.ones(31, np.float32)}, ["'output_norm.weight'", "[31]", "[32]"]),
        ({"output_norm.weight": np.full(32, np.nan, np.float32)}, ["'output_norm.weight'", "NaN"]),
        ({"output_norm.weight": np.ones(32, np.int32)}, ["'output_norm.weight'", "I32"]),
        ({"output_norm.weight": np.ones(32, np.float64)}, ["'output_norm.weight'", "float64"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_gguf_tensors_that_do_not_fit_are_refused_by_name(change, words, tmp_path):
    model = make_llama()
    tensors = {name: value for name, value in (gguf_tensors(model) | change).items() if value is not None}
    assert_refused(write_gguf(tmp_path / "model.gguf", model, tensors=tensors), *words)


def test_missing_gguf_package_is_named(gguf_bytes, tmp_path, monkeypatch):
    original = builtins.__import__

    def without_gguf(name, *rest):
        if name == "gguf":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert_refused(write_bytes(tmp_path, gguf_bytes), 'pip install "wm-graph[import]"', error=RuntimeUnavailableError)


@pytest.fixture
def folder(tmp_path):
    make_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, ["model_type is 'mistral'", "expected one of llama, doge"]),
        ({"model_type": "absent"}, ["'model_type' is missing"]),
        ({"hidden_size": "absent"}, ["'hidden_size' is missing", "whole number"]),
        ({"vocab_size": "absent"}, ["'vocab_size' is missing"]),
        ({"num_hidden_layers": "absent"}, ["'num_hidden_layers' is missing"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "2 layers"]),
        ({"hidden_size": "32"}, ["'hidden_size' is '32'", "whole number"]),
        ({"hidden_size": 32.5}, ["'hidden_size' is 32.5"]),
        ({"num_attention_heads": 0}, ["n_head is 0"]),
        ({"num_attention_heads": -4, "head_dim": None}, ["config.json"]),
        ({"vocab_size": True}, ["'vocab_size' is True"]),
        ({"vocab_size": 97}, ["'model.embed_tokens.weight'", "[96, 32]", "[97, 32]"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "'lm_head.weight'"]),
        ({"attention_bias": True}, ["self_attn.q_proj.bias' is missing", "[32]"]),
        ({"mlp_bias": True}, ["mlp.gate_proj.bias' is missing", "[64]"]),
        ({"mlp_bias": 1}, ["'mlp_bias' is 1", "true or false"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling", "'yarn'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["rope_parameters", "'longrope'"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["rope_parameters", "'factor' is missing"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": "4"}}, ["rope_scaling", "'factor' is '4'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ["'high_freq_factor' is missing"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            ["rope_low 4.0 is not below rope_high 1.0"],
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, ["rope_theta", "'big'"]),
        ({"rope_parameters": 7}, ["rope_parameters", "expected an object"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"rms_norm_eps": -1.0}, ["norm_eps is -1.0"]),
        ({"eos_token_id": 96}, ["eos_token_id is 96"]),
    ],
    ids=str,
)
def test_config_that_makes_another_model_is_refused(changes, words, folder):
    (folder / "generation_config.json").unlink()
    change_config(folder, **changes)
    assert_refused(folder, *words)


@pytest.mark.parametrize("changes", [{"is_moe": True}, {"sliding_window": 64}], ids=str)
def test_doge_that_is_not_dense_and_global_is_refused(changes, tmp_path):
    make_doge().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", **changes)
    assert_refused(tmp_path / "source", next(iter(changes)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1} x', "\ud800"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_refused_by_name(name, text, folder):
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_refused(folder, name)


def change_tensors(folder, **changes):
    path = folder / "model.safetensors"
    save_file({name: value for name, value in (load_file(path) | changes).items() if value is not None}, path)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("model.norm.weight", lambda value: None, "is missing"),
        ("model.norm.bias", lambda value: load_norm(), "is unknown"),
        ("model.layers.1.mlp.up_proj.weight", lambda value: value.T.contiguous(), "has shape [32, 64], expected [64, 32]"),
        ("model.layers.0.self_attn.o_proj.weight", lambda value: value / 0, "NaN or infinity"),
        ("model.norm.weight", lambda value: value.double(), "float64"),
        ("model.norm.weight", lambda value: value.int(), "int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(name, change, word, folder):
    tensors = load_file(folder / "model.safetensors")
    change_tensors(folder, **{name: change(tensors.get(name))})
    assert_refused(folder, "source/model.safetensors: tensor", name, word)


def load_norm():
    return make_llama().model.norm.weight.detach()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors_are_refused(part, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert_refused(folder, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda value: value * float("nan"), "NaN or infinity"),
        (lambda value: value[1:], "has shape"),
        (lambda value: value.double(), "float64"),
        (lambda value: None, "is missing"),
    ],
)
def test_tensor_that_does_not_fit_is_refused_with_its_shard(change, word, tmp_path):
    make_llama().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    shards = sorted((tmp_path / "source").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in (shards[0], shards[-1]):
        original = load_file(shard)
        name = next(iter(original))
        changed = {key: change(value) if key == name else value for key, value in original.items()}
        save_file({key: value for key, value in changed.items() if value is not None}, shard)
        assert_refused(tmp_path / "source", f"{shard.name}: tensor {name!r}", word)
        save_file(original, shard)


def test_tensor_that_no_shard_is_said_to_hold_is_refused_with_the_index(tmp_path):
    make_llama().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    index = tmp_path / "source" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = tmp_path / "source" / values["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(values))
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    assert_refused(tmp_path / "source", f"{index.name}: tensor 'model.norm.weight' is missing")


def test_missing_shard_is_refused_by_name(tmp_path):
    make_llama().save_pretrained(tmp_path / "source", max_shard_size="20KB")
    shard = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(tmp_path / "source", shard.name)


def test_shard_outside_the_folder_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert_refused(folder, "../model.safetensors")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_refused(folder, "pytorch_model.bin", "safetensors")
    assert_refused(folder / "pytorch_model.bin", "safetensors")


def test_wrong_places_are_refused(folder, tmp_path):
    assert_refused(tmp_path / "nowhere", "no such file or folder")
    assert_refused(folder / "model.safetensors", "name the folder")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "neither a .gguf file nor safetensors")


def test_two_gguf_files_are_refused_with_a_name_to_choose(gguf_bytes, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(gguf_bytes)
    assert_refused(folder, "2 GGUF files", "a.gguf")


def test_own_checkpoint_is_refused_with_the_reason(folder, tmp_path):
    convert(folder, tmp_path / "first")
    assert_refused(tmp_path / "first", "checkpoint of wm-graph already")


@pytest.mark.parametrize("command", ["export", "export --targets hf", "info", "upcycle"])
def test_hugging_face_folder_in_place_of_a_checkpoint_is_named(command, folder, tmp_path, capfd):
    verb, *options = command.split()
    options += [] if verb == "info" else ["-o", tmp_path / "made"]
    options += ["--experts", 4, "--retrieval-heads", 1, "--picks", 1, "--retrieval-width", 2] if verb == "upcycle" else []
    refused = wm(capfd, verb, folder, *options)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert f"{folder}: is a Hugging Face folder" in refused.err
    assert f"wm import {folder} -o CHECKPOINT" in refused.err
    assert len(refused.err) < 400
    assert not (tmp_path / "made").exists()


def test_taken_folder_is_left_as_it_was(folder, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "note").write_text("mine")
    assert_refused(folder, "already exists")
    assert (tmp_path / "made" / "note").read_text() == "mine"
