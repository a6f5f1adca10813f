import json

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from import_sources import convert, gguf_tensors, make_doge, make_llama, write_gguf
from wm_graph import forward, load_checkpoint, zero_state
from wm_graph.importers import import_source
from wm_graph.params import params_from_flat
from wm_graph.shapes import parameter_shapes

MODELS = {
    "llama-tied": (make_llama, {"tie_word_embeddings": True}),
    "llama-untied": (make_llama, {"tie_word_embeddings": False}),
    "llama-no-groups": (make_llama, {"num_key_value_heads": 4}),
    "llama-wide-heads": (make_llama, {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "doge-tied": (make_doge, {"tie_word_embeddings": True}),
    "doge-untied": (make_doge, {"tie_word_embeddings": False}),
    "doge-no-window": (make_doge, {"keep_window_size": 64}),
}
GGUF = ("llama",)  # what GGUF files here hold


@pytest.fixture(params=MODELS)
def model(request):
    make, options = MODELS[request.param]
    return make(**options)


def expected_tensors(model):
    """What the import must give, from the transformers state dict."""
    state, config = model.state_dict(), model.config
    expected = {"embedding": state["model.embed_tokens.weight"], "norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        expected["head"] = state["lm_head.weight"]
    for index in range(config.num_hidden_layers):
        prefix, layer = f"model.layers.{index}.", f"layers.{index}."
        expected[layer + "mixer_norm"] = state[prefix + "input_layernorm.weight"]
        expected[layer + "mixer.qkv"] = torch.cat([state[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"])
        expected[layer + "mixer.out"] = state[prefix + "self_attn.o_proj.weight"]
        expected[layer + "feed_forward_norm"] = state[prefix + "post_attention_layernorm.weight"]
        expected[layer + "feed_forward.gate_up"] = torch.cat([state[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")])
        expected[layer + "feed_forward.down"] = state[prefix + "mlp.down_proj.weight"]
        if config.model_type == "doge":
            expected[layer + "mixer.dt"] = state[prefix + "self_attn.dt_proj.weight"]
            expected[layer + "mixer.A"] = state[prefix + "self_attn.A"].float()
            expected[layer + "mixer.q_norm"] = state[prefix + "self_attn.q_norm.weight"]
            expected[layer + "mixer.k_norm"] = state[prefix + "self_attn.k_norm.weight"]
            expected[layer + "mixer_residual"] = state[prefix + "input_residual"]
            expected[layer + "feed_forward_residual"] = state[prefix + "post_attention_residual"]
    return expected


def assert_same_tensors(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_logits(cfg, params, model, limit=1e-4):
    """Prefill and 8 cached steps; no token twice, since ties at the window's edge have no order in transformers."""
    tokens = torch.stack([torch.randperm(cfg.vocab_size, generator=torch.Generator().manual_seed(seed))[:32] for seed in (1, 2)])
    prompt = 24
    with torch.no_grad():
        reference = model(tokens[:, :prompt], use_cache=True)
        logits, state = forward(cfg, params, tokens[:, :prompt], zero_state(cfg, 2, 32))
        torch.testing.assert_close(logits, reference.logits, rtol=0, atol=limit)
        assert reference.logits.std() > 0.3  # a limit on nothing would always hold
        for step in range(prompt, 32):
            reference = model(tokens[:, step : step + 1], past_key_values=reference.past_key_values, use_cache=True)
            logits, state = forward(cfg, params, tokens[:, step : step + 1], state)
            torch.testing.assert_close(logits, reference.logits, rtol=0, atol=limit)


def test_folder_gives_the_tensors_of_the_transformers_model(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    imported = import_source(tmp_path / "source")
    assert_same_tensors(imported.tensors, expected_tensors(model))
    assert list(imported.tensors) == list(parameter_shapes(imported.cfg))


def test_folder_gives_the_logits_of_the_transformers_model(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    imported = import_source(tmp_path / "source")
    assert_same_logits(imported.cfg, params_from_flat(imported.cfg, imported.tensors), model)


def test_written_checkpoint_loads_with_the_same_tensors(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made")
    cfg, params = load_checkpoint(tmp_path / "made")
    assert cfg == import_source(tmp_path / "source").cfg
    assert_same_logits(cfg, params, model)


@pytest.mark.parametrize("make", [make_llama, make_doge])
def test_shards_give_the_tensors_of_one_file(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    assert_same_tensors(import_source(tmp_path / "source").tensors, expected_tensors(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [make_llama, make_doge])
def test_half_precision_is_kept_except_for_decay_rates(make, dtype, tmp_path):
    model = make(dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    assert_same_tensors(import_source(tmp_path / "source").tensors, expected_tensors(model))


def test_chosen_dtype_is_the_rounded_source(tmp_path):
    model = make_doge()
    model.save_pretrained(tmp_path / "source")
    expected = {name: value if name.endswith(".A") else value.bfloat16() for name, value in expected_tensors(model).items()}
    assert_same_tensors(import_source(tmp_path / "source", dtype=torch.bfloat16).tensors, expected)


def test_old_style_theta_beside_null_scaling_is_read(tmp_path):
    make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1234.0, "rope_scaling": None}))
    assert import_source(tmp_path).cfg.rope_theta == 1234.0


def test_progress_counts_every_parameter_once(tmp_path):
    make_llama().save_pretrained(tmp_path)
    seen = []
    imported = import_source(tmp_path, progress=lambda name, done, total: seen.append((name, done, total)))
    assert seen == [(name, index + 1, len(imported.tensors)) for index, name in enumerate(imported.tensors)]


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"head_dim": 16}], ids=str)
def test_gguf_gives_the_tensors_and_logits_of_the_model_it_was_made_from(options, tmp_path):
    model = make_llama(**options)
    wide = {"llama.attention.key_length": 16, "llama.attention.value_length": 16} if "head_dim" in options else {}
    imported = import_source(write_gguf(tmp_path / "model.gguf", model, metadata=wide))
    assert_same_tensors(imported.tensors, expected_tensors(model))
    assert_same_logits(imported.cfg, params_from_flat(imported.cfg, imported.tensors), model)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_gguf_of_any_kind_gives_what_transformers_reads(kind, tmp_path):
    model = make_llama(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "model.gguf", model, kind)
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(read)
    assert_same_tensors(import_source(path, dtype=torch.float32).tensors, expected_tensors(model))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0"])
def test_gguf_block_formats_are_dequantised_as_the_gguf_package_does(kind, tmp_path):
    model = make_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    quantisation = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 60, (256, 256 // block * block_bytes), dtype=np.uint8)  # below 60 no scale is NaN or infinite
    tensors = gguf_tensors(model) | {"blk.0.ffn_down.weight": raw}
    path = write_gguf(tmp_path / "model.gguf", model, tensors=tensors, raw_kind=kind)
    found = import_source(path).tensors["layers.0.feed_forward.down"]
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(raw, quantisation)))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_half_precision_gguf_keeps_its_type_where_its_float32_norms_allow_it(kind, dtype, tmp_path):
    rounded = make_llama().to(dtype)
    exact = import_source(write_gguf(tmp_path / "exact.gguf", rounded, kind))
    assert_same_tensors(exact.tensors, expected_tensors(rounded))
    wide = import_source(write_gguf(tmp_path / "wide.gguf", make_llama(), kind))
    assert {tensor.dtype for tensor in wide.tensors.values()} == {torch.float32}


def test_folder_with_one_gguf_is_that_gguf(tmp_path):
    model = make_llama()
    write_gguf(tmp_path / "model.gguf", model)
    assert_same_tensors(import_source(tmp_path).tensors, expected_tensors(model))


def test_float32_epsilon_of_gguf_is_the_decimal_it_was_written_as(tmp_path):
    assert import_source(write_gguf(tmp_path / "model.gguf", make_llama())).cfg.norm_eps == 1e-5
