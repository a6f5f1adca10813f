"""Hugging Face folders written from checkpoints, as transformers loads them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli_support import wm
from hybrid_sources import make_bamba, make_jamba, make_mamba2
from import_sources import convert, make_doge, make_llama
from wm_graph import ModelConfig, forward, init_params, save_checkpoint
from wm_graph.data import tokenizer_path
from wm_graph.errors import CheckpointError, ExportError
from wm_graph.exporters import export_hf_folder
from wm_graph.exporters.architecture import find_architecture
from wm_graph.importers import import_source, write_imported

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 900.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
MODELS = {
    "llama-untied-wide-heads": (make_llama, {"head_dim": 16, "attention_bias": True}),
    "llama-tied-biases": (make_llama, {"tie_word_embeddings": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-dynamic": (make_llama, {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama-scaled": (make_llama, {"rope_parameters": LLAMA3, "num_hidden_layers": 3}),
    "doge-tied": (make_doge, {"tie_word_embeddings": True, "mlp_bias": True}),
    "doge-untied": (make_doge, {"num_key_value_heads": 4, "intermediate_size": 40}),
    "doge-one-kv-head": (make_doge, {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "mamba2-tied": (make_mamba2, {"tie_word_embeddings": True}),
    "mamba2-limits": (make_mamba2, {"time_step_limit": (0.01, 0.5), "n_groups": 1, "use_conv_bias": False}),
    "mamba2-biases": (make_mamba2, {"expand": 3, "num_heads": 6, "head_dim": 16, "n_groups": 3, "use_bias": True}),
    "jamba-untied": (make_jamba, {}),
    "jamba-tied-biases": (make_jamba, {"tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_dt_rank": 5, "mamba_expand": 3}),
    "jamba-dense": (make_jamba, {"num_experts": 1, "attn_layer_period": 9, "attn_layer_offset": 8, "mamba_conv_bias": False}),
    "jamba-attention": (make_jamba, {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 4}),
    "bamba-untied": (make_bamba, {"time_step_limit": (0.01, float("inf"))}),
    "bamba-tied-biases": (make_bamba, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True}),
    "bamba-no-attention": (make_bamba, {"attn_layer_indices": None, "mamba_n_groups": 4, "mamba_conv_bias": False}),
}


@pytest.fixture(params=MODELS)
def model(request):
    make, options = MODELS[request.param]
    return make(**options)


def exported(model, folder):
    """The model saved by transformers, imported, exported, and loaded by transformers again."""
    model.save_pretrained(folder / "source", max_shard_size="20KB")
    convert(folder / "source", folder / "checkpoint")
    export_hf_folder(folder / "checkpoint", folder / "made")
    again, report = AutoModelForCausalLM.from_pretrained(folder / "made", output_loading_info=True)
    assert not any(report.values()), report
    return again


def assert_same_state(found, expected):
    assert found.config.model_type == expected.config.model_type
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(found.state_dict()[name], tensor), name


def test_exported_folder_loads_in_transformers_with_every_bit_of_the_imported_one(model, tmp_path):
    again = exported(model, tmp_path)
    assert_same_state(again, model)
    tokens = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:41].unsqueeze(0)
    again.set_attn_implementation(model.config._attn_implementation)
    with torch.no_grad():
        found, expected = (made.eval()(tokens, use_cache=False).logits for made in (again, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # the chunk of a scan is not in a checkpoint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make_llama, make_doge, make_mamba2, make_jamba, make_bamba])
def test_half_precision_comes_back_bit_for_bit(make, dtype, tmp_path):
    model = make(dtype=dtype)
    assert_same_state(exported(model, tmp_path), model)
    assert {tensor.dtype for tensor in load_file(tmp_path / "made" / "model.safetensors").values()} == {dtype}


def test_decay_rates_that_half_precision_would_round_stay_float32(tmp_path):
    make_jamba().save_pretrained(tmp_path / "source")
    imported = import_source(tmp_path / "source", dtype=torch.bfloat16)
    write_imported(imported, tmp_path / "checkpoint")
    export_hf_folder(tmp_path / "checkpoint", tmp_path / "made")
    again = import_source(tmp_path / "made")
    assert again.tensors["embedding"].dtype == torch.bfloat16
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in imported.tensors.items())


def test_exported_folder_is_imported_as_the_same_model(model, tmp_path):
    exported(model, tmp_path)
    first, again = import_source(tmp_path / "source"), import_source(tmp_path / "made")
    assert replace(again.cfg, name=first.cfg.name) == first.cfg
    assert again.generation == first.generation
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())


def change(preset, **changes):
    return replace(ModelConfig.preset(preset), **changes)


OURS = {
    "llama": change("llama-tiny", layers=(("attention", "mlp"),) * 2),
    "mamba2": change("mamba2-tiny", layers=(("mamba2", "none"),) * 2),
    "jamba": change("jamba-tiny", keep_window=3, d_retrieval=5),
    "jamba of attention alone": change("llama-tiny", attention_rope=False, rope_theta=7.0),
    "bamba of attention alone": change("llama-tiny", n_head=3, n_kv_head=3, head_dim=10, rotary_dim=6, rope_theta=7.0),
}


@pytest.mark.parametrize(("name", "cfg"), OURS.items(), ids=OURS)
def test_model_of_ours_gives_the_same_logits_in_transformers(name, cfg, tmp_path):
    params = init_params(cfg)
    save_checkpoint(tmp_path / "checkpoint", cfg, params)
    export_hf_folder(tmp_path / "checkpoint", tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert model.config.model_type == name.split()[0]
    tokens = torch.randint(0, cfg.vocab_size, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(forward(cfg, params, tokens, None)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_and_chat_template_come_along(add_bos, tmp_path):
    cfg = ModelConfig.preset("llama-tiny")
    cfg = replace(cfg, vocab_size=8192)
    tokens = {"bos": 1, "eos": 2, "pad": 0, "stop": [2, 5], "add_bos": add_bos}
    template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    files = {"tokenizer.json": tokenizer_path().read_text(), "generation.json": json.dumps({"tokens": tokens, "chat_template": template})}
    save_checkpoint(tmp_path / "checkpoint", cfg, init_params(cfg), files)
    export_hf_folder(tmp_path / "checkpoint", tmp_path / "made")
    again = import_source(tmp_path / "made")
    assert again.generation == {"tokens": tokens, "chat_template": template}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    plain = tokenizer("The capital", add_special_tokens=False)["input_ids"]
    assert tokenizer("The capital")["input_ids"] == ([1] if add_bos else []) + plain
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "made").generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 5], 0)


REFUSED = {
    "cheems": (change("cheems-tiny"), ["dynamic_mask_attention/ssd + mlp", "mamba2 + none"]),
    "cheems-2407": (change("cheems-2407-tiny"), ["inner_function_attention", "cdmoe"]),
    "learned residual": (change("llama-tiny", learned_residual=True), ["llama: learned_residual is True, there it is False"]),
    "no rope": (
        change("llama-tiny", attention_rope=False, attention_bias=True),
        ["llama: attention_rope is False", "jamba: attention_bias"],
    ),
    "rotated state": (change("mamba2-tiny", ssd_rope=True), ["ssd_rope is True"]),
    "odd heads": (
        change("llama-tiny", n_head=3, n_kv_head=3, rope_dynamic_cache=True, rope_scaling="dynamic"),
        ["d_model 64 is not a multiple of n_head 3"],
    ),
    "odd expansion": (change("mamba2-tiny", ssd_head=3), ["expand"]),
    "no norms": (change("jamba-tiny", mamba1_norm=False), ["mamba1_norm is False"]),
    "normalised experts": (change("jamba-tiny", moe_normalize=True), ["moe_normalize is True"]),
    "layers": (
        change("jamba-tiny", layers=(("attention", "mlp"),) * 2 + (("mamba1", "mlp"),)),
        ["jamba: its layers come in another order"],
    ),
    "one expert": (change("jamba-tiny", n_expert=1), ["layers"]),
    "doge mask": (change("doge-20m", dma_mask="log"), ["doge: dma_mask is 'log'"]),
    "dynamic cache": (
        change("llama-tiny", rope_scaling="dynamic", rope_factor=2.0, rope_dynamic_cache=True),
        ["rope_dynamic_cache is True"],
    ),
}


@pytest.mark.parametrize(("cfg", "words"), REFUSED.values(), ids=REFUSED)
def test_model_that_no_architecture_describes_is_refused_with_the_field(cfg, words):
    with pytest.raises(ExportError) as caught:
        find_architecture(cfg)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


def test_refused_or_failed_export_leaves_nothing(tmp_path, monkeypatch):
    cfg = ModelConfig.preset("llama-tiny")
    save_checkpoint(tmp_path / "checkpoint", cfg, init_params(cfg))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        export_hf_folder(tmp_path / "checkpoint", tmp_path / "taken")
    monkeypatch.setattr("wm_graph.exporters.hf_folder.save_file", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_hf_folder(tmp_path / "checkpoint", tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "taken"]


def test_command_writes_the_folder_and_refuses_what_it_cannot(tmp_path, capfd):
    cheems, llama = tmp_path / "cheems", tmp_path / "llama"
    assert wm(capfd, "init", "cheems-tiny", "-o", cheems).code == 0
    assert wm(capfd, "init", "llama-tiny", "-o", llama).code == 0
    made = wm(capfd, "export", llama, "--targets", "hf", "-o", tmp_path / "made")
    assert made.code == 0
    assert "model.safetensors" in made.out
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == names
    for words, *options in [
        ("no Hugging Face architecture", cheems, "--targets", "hf", "-o", tmp_path / "x"),
        ("not part of a bundle", llama, "--targets", "hf,onnx", "-o", tmp_path / "x"),
        ("not part of a bundle", "--targets", "hf", "--into", tmp_path / "x"),
        ("leave out --dtype", llama, "--targets", "hf", "--dtype", "fp16", "-o", tmp_path / "x"),
        ("already exists", llama, "--targets", "hf", "-o", tmp_path / "made"),
        ("no such checkpoint", tmp_path / "absent", "--targets", "hf", "-o", tmp_path / "x"),
    ]:
        refused = wm(capfd, "export", *options)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1), refused
        assert words in refused.err
        assert not (tmp_path / "x").exists()
