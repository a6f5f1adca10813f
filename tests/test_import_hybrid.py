"""Mamba2, Jamba and Bamba from Hugging Face folders, judged by transformers on the CPU."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_support import wm
from hybrid_sources import make_bamba, make_jamba, make_mamba2
from import_sources import convert, make_llama
from test_import_damaged import assert_refused, change_config
from wm_graph import forward, load_checkpoint, zero_state
from wm_graph.importers import import_source
from wm_graph.params import params_from_flat

LIMIT = 1e-4  # max abs on float32 logits of scale about 1
INFINITY = {"__float__": "Infinity"}
PROMPT, STEPS = 37, 8  # 37 is no multiple of a chunk
MODELS = {
    "mamba2-tied-groups": (make_mamba2, {"tie_word_embeddings": True}),
    "mamba2-one-group-no-conv-bias": (make_mamba2, {"n_groups": 1, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba2-wide-biases": (make_mamba2, {"expand": 3, "num_heads": 6, "head_dim": 16, "n_groups": 3, "use_bias": True}),
    "jamba-untied": (make_jamba, {}),
    "jamba-tied-biases": (make_jamba, {"tie_word_embeddings": True, "mamba_proj_bias": True, "mamba_dt_rank": 5, "mamba_expand": 3}),
    "jamba-dense": (make_jamba, {"num_experts": 1, "attn_layer_period": 4, "attn_layer_offset": 0, "mamba_conv_bias": False}),
    "jamba-other-periods": (make_jamba, {"expert_layer_period": 3, "expert_layer_offset": 0, "num_experts_per_tok": 3, "mamba_d_conv": 2}),
    "bamba-untied": (make_bamba, {}),
    "bamba-tied-biases": (make_bamba, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True}),
    "bamba-no-attention": (make_bamba, {"attn_layer_indices": None, "mamba_n_groups": 4, "mamba_conv_bias": False}),
    "bamba-whole-rotary": (make_bamba, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}}),
    "llama-biases": (make_llama, {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(params=MODELS)
def model(request):
    make, options = MODELS[request.param]
    return make(**options)


def tokens_of(model):
    return torch.randint(0, model.config.vocab_size, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))


def logits_of_transformers(model, tokens, pieces):
    """Prefill and cached steps; at once where transformers cannot cache: Bamba without attention."""
    if getattr(model.config, "attn_layer_indices", True) is None:
        return model(tokens, use_cache=False).logits
    is_mamba2 = model.config.model_type == "mamba2"
    name = "cache_params" if is_mamba2 else "past_key_values"
    # Bamba counts every call's positions from 0 unless they are given.
    positions = [{} if is_mamba2 else {"position_ids": piece} for piece in torch.arange(tokens.shape[1]).unsqueeze(0).split(pieces, 1)]
    parts, cache = [], {}
    for piece, options in zip(tokens.split(pieces, 1), positions, strict=True):
        out = model(piece, use_cache=True, **cache, **options)
        parts.append(out.logits)
        cache = {name: getattr(out, name)}
    return torch.cat(parts, 1)


def logits_of_ours(cfg, params, tokens, pieces):
    parts, state = [], zero_state(cfg, tokens.shape[0], tokens.shape[1])
    for piece in tokens.split(pieces, 1):
        logits, state = forward(cfg, params, piece, state)
        parts.append(logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def assert_same_logits(cfg, params, model):
    tokens, pieces = tokens_of(model), [PROMPT, *[1] * STEPS]
    expected = logits_of_transformers(model, tokens, pieces)
    assert expected.std() > 0.3  # a limit on nothing would always hold
    found = logits_of_ours(cfg, params, tokens, pieces)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)


def test_imported_model_gives_the_logits_of_transformers_in_prefill_and_cached_steps(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made")
    assert_same_logits(*load_checkpoint(tmp_path / "made"), model)


def test_shards_give_the_tensors_of_one_file(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = import_source(tmp_path / "one").tensors, import_source(tmp_path / "many").tensors
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())


def test_experts_stored_in_one_tensor_are_the_same_as_one_by_one(tmp_path):
    model = make_jamba()
    model.save_pretrained(tmp_path / "apart")
    shutil.copytree(tmp_path / "apart", tmp_path / "joined")
    assert "model.layers.1.feed_forward.experts.3.up_proj.weight" in load_file(tmp_path / "apart" / "model.safetensors")
    save_file(model.state_dict(), tmp_path / "joined" / "model.safetensors", metadata={"format": "pt"})
    apart, joined = import_source(tmp_path / "apart").tensors, import_source(tmp_path / "joined").tensors
    assert list(apart) == list(joined)
    assert all(torch.equal(joined[name], tensor) for name, tensor in apart.items())


@pytest.mark.parametrize("limit", [[0.01, 0.2], [0.0, INFINITY], [0.05, math.inf], None], ids=str)
@pytest.mark.parametrize("make", [make_mamba2, make_bamba])
def test_step_limits_are_read_in_every_form_and_kept(make, limit, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    change_config(tmp_path, time_step_limit=limit)
    imported = import_source(tmp_path)
    tokens = tokens_of(model)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = [math.inf if end == INFINITY else end for end in limit or (0.0, math.inf)]
    with torch.no_grad():  # at once: a cached step of transformers 5.17 does not limit
        expected = model(tokens, use_cache=False).logits
        found, _ = forward(imported.cfg, params_from_flat(imported.cfg, imported.tensors), tokens, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=LIMIT)


def test_float32_decay_rates_of_a_half_precision_source_stay_as_they_are(tmp_path):
    model = make_jamba(dtype=torch.bfloat16)
    rates = {name: torch.rand(value.shape) for name, value in model.state_dict().items() if name.endswith("A_log")}
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | rates, path, metadata={"format": "pt"})
    tensors = import_source(tmp_path).tensors
    assert tensors["embedding"].dtype == torch.bfloat16
    assert torch.equal(tensors["layers.0.mixer.A_log"], rates["model.layers.0.mamba.A_log"])


def test_dt_rank_auto_is_a_sixteenth_of_the_width_rounded_up(tmp_path):
    make_jamba(hidden_size=40).save_pretrained(tmp_path)
    change_config(tmp_path, mamba_dt_rank="auto")
    assert import_source(tmp_path).cfg.dt_rank == 3


MIXER = "backbone.layers.0.mixer"
REFUSED = [
    (make_mamba2, {"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "expected 'silu'"]),
    (make_mamba2, {"expand": 3}, ["expand is 3", "64"]),
    (make_mamba2, {"n_groups": 3}, ["ssd_head 8 is not a multiple of ssd_group 3"]),
    (make_mamba2, {"n_groups": "absent"}, ["'n_groups' is missing"]),
    (make_mamba2, {"state_size": 0}, ["ssd_state is 0"]),
    (make_mamba2, {"state_size": 13}, ["'backbone.layers.0.mixer.in_proj.weight' has shape [184, 32], expected [188, 32]"]),
    (make_mamba2, {"conv_kernel": 1}, ["conv_size is 1"]),
    (make_mamba2, {"conv_kernel": 5}, ["conv1d.weight' has shape [112, 1, 4], expected [112, 1, 5]"]),
    (make_mamba2, {"use_bias": True}, ["in_proj.bias' is missing"]),
    (make_mamba2, {"use_conv_bias": False}, ["conv1d.bias' is unknown"]),
    (make_mamba2, {"use_conv_bias": "no"}, ["'use_conv_bias' is 'no'", "true or false"]),
    (make_mamba2, {"time_step_limit": [0.0]}, ["time_step_limit is [0.0]", "[least, largest]"]),
    (make_mamba2, {"time_step_limit": [0.0, {"__float__": "NaN"}]}, ["time_step_limit", "NaN"]),
    (make_mamba2, {"time_step_limit": [0.0, 0.0]}, ["time_step_limit is [0.0, 0.0]"]),
    (make_mamba2, {"time_step_limit": [0.5, 0.1]}, ["dt_min 0.5 exceeds dt_max 0.1"]),
    (make_mamba2, {"time_step_limit": [INFINITY, INFINITY]}, ["time_step_limit"]),
    (make_mamba2, {"num_hidden_layers": 2}, ["num_hidden_layers is 2", "3 layers"]),
    (make_jamba, {"sliding_window": 8}, ["sliding_window is 8"]),
    (make_jamba, {"mamba_inner_layernorms": False}, ["mamba_inner_layernorms is False"]),
    (make_jamba, {"attn_layer_period": 0}, ["attn_layer_period is 0", "at least 1"]),
    (make_jamba, {"expert_layer_offset": 2}, ["expert_layer_offset is 2", "0 to 1"]),
    (make_jamba, {"attn_layer_offset": 0}, ["layers.0.self_attn.q_proj.weight' is missing"]),
    (make_jamba, {"num_experts": 5}, ["experts.4.gate_proj.weight' is missing", "[48, 32]"]),
    (make_jamba, {"num_experts": 3}, ["experts.3.down_proj.weight' is unknown"]),
    (make_jamba, {"num_experts_per_tok": 5}, ["n_pick 5 exceeds n_expert 4"]),
    (make_jamba, {"mamba_dt_rank": "all"}, ["'mamba_dt_rank' is 'all'", "whole number"]),
    (make_jamba, {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    (make_bamba, {"attn_layer_indices": [1, 5]}, ["attn_layer_indices is [1, 5]", "0 to 4"]),
    (make_bamba, {"attn_layer_indices": ["a"]}, ["attn_layer_indices", "'a'"]),
    (make_bamba, {"attn_layer_indices": [2, 4]}, ["layers.1.mamba.in_proj.weight' is missing"]),
    (make_bamba, {"mamba_d_head": 4}, ["mamba_expand is 2", "32"]),
    (make_bamba, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2.0}}, ["partial_rotary_factor is 2.0", "head_dim 8"]),
    (make_bamba, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, ["rotary_dim 3 is odd"]),
    (make_bamba, {"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "yarn"]),
]


@pytest.mark.parametrize(("make", "changes", "words"), REFUSED, ids=[f"{make.__name__} {changes}"[5:60] for make, changes, _ in REFUSED])
def test_config_that_makes_another_model_is_refused(make, changes, words, tmp_path):
    make().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", **changes)
    assert_refused(tmp_path / "source", *words)


@pytest.mark.parametrize(
    ("make", "name", "value", "words"),
    [
        (make_mamba2, f"{MIXER}.D", None, ["'backbone.layers.0.mixer.D' is missing", "[8]"]),
        (make_mamba2, f"{MIXER}.conv1d.weight", torch.ones(112, 4), ["has shape [112, 4], expected [112, 1, 4]"]),
        (make_mamba2, f"{MIXER}.extra", torch.ones(3), ["mixer.extra' is unknown"]),
        (make_mamba2, f"{MIXER}.A_log", torch.full((8,), math.nan), ["mixer.A_log' holds NaN"]),
        (make_mamba2, "lm_head.weight", None, ["'lm_head.weight' is missing"]),
        (make_jamba, "model.layers.1.feed_forward.experts.2.up_proj.weight", None, ["experts.2.up_proj.weight' is missing"]),
        (make_jamba, "model.layers.1.feed_forward.experts.2.up_proj.weight", torch.ones(48, 31), ["[48, 31], expected [48, 32]"]),
        (make_jamba, "model.layers.1.feed_forward.experts.gate_up_proj", torch.ones(4, 96, 32), ["experts.down_proj' is missing"]),
        (make_bamba, "model.layers.0.mamba.norm.weight", torch.ones(63), ["mamba.norm.weight' has shape [63], expected [64]"]),
    ],
    ids=lambda value: value.rsplit(".", 2)[-2] if isinstance(value, str) else None,
)
def test_tensors_that_do_not_fit_are_named(make, name, value, words, tmp_path):
    make().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if value is None else tensors | {name: value}, path, metadata={"format": "pt"})
    assert_refused(tmp_path / "source", *words)


def test_command_refuses_an_unsupported_field_with_exit_code_2(tmp_path, capfd):
    make_jamba().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", hidden_act="relu")
    refused = wm(capfd, "import", tmp_path / "source", "-o", tmp_path / "made")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "hidden_act is 'relu'" in refused.err
    assert not (tmp_path / "made").exists()
