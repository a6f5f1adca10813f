"""Keys of a config.json: those of published models pass, those that could change the model are named."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import GenerationConfig

from cli_support import wm
from hybrid_sources import make_bamba, make_jamba, make_mamba2
from import_sources import make_doge, make_llama
from test_import_damaged import assert_refused, change_config
from wm_graph.importers import import_source
from wm_graph.importers.config_keys import HARMLESS
from wm_graph.importers.families import FAMILIES

MAKERS = {"llama": make_llama, "doge": make_doge, "mamba2": make_mamba2, "jamba": make_jamba, "bamba": make_bamba}
JS = {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
DYNAMIC = {"factor": 4.0, "original_max_position_embeddings": 2048, "rope_type": "dynamic"}
OLD = {"transformers_version": "4.42.3", "torch_dtype": "bfloat16", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}
# What the config.json files of published models hold beside the sizes; "absent": what they, written by older versions, do not have.
PUBLISHED = {
    "SmolLM2-135M-Instruct": (
        make_llama,
        {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "pretraining_tp": 1}
        | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "initializer_range": 0.041666666666666664}
        | {"pad_token_id": 2, "transformers.js_config": JS, "architectures": ["LlamaForCausalLM"], "rope_parameters": "absent"},
    ),
    "Llama-2-7b": (
        make_llama,
        {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 2, "rope_scaling": None, "rope_parameters": "absent"}
        | {"max_length": 4096, "temperature": 0.9, "do_sample": True, "head_dim": "absent"},
    ),
    "Llama-3.1-8B": (
        make_llama,
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "max_position_embeddings": 131072, "eos_token_id": [1, 8, 9]}
        | {"rope_parameters": "absent", "unsloth_fixed": True, "_attn_implementation_autoset": True},
    ),
    "Mamba-Codestral-7B": (
        make_mamba2,
        {"_name_or_path": "/raid/x/", "intermediate_size": 8192, "norm_before_gate": True, "rms_norm": True, "residual_in_fp32": True}
        | {"time_step_init_scheme": "random", "time_step_scale": 1.0, "time_step_rank": 256, "time_step_limit": [0.0, math.inf]}
        | {"time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001, "chunk_size": 256, "rescale_prenorm_residual": False},
    ),
    "Jamba-v0.1": (
        make_jamba,
        {"auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"}, "calc_logits_for_entire_prompt": False, "n_ctx": 262144}
        | {"mamba_inner_layernorms": True, "use_mamba_kernels": True, "sliding_window": None, "router_aux_loss_coef": 0.001},
    ),
    "AI21-Jamba-1.5-Mini": (
        make_jamba,
        {"num_logits_to_keep": 1, "output_router_logits": False, "eos_token_id": [2, 18], "use_mamba_kernels": False},
    ),
    "Doge-20M": (
        make_doge,
        {"rope_scaling": DYNAMIC, "rope_theta": 10000.0, "dynamic_mask_ratio": 0.0, "hidden_bias": False, "hidden_dropout": 0.0}
        | {"num_cdmoe_experts": 2048, "num_cdmoe_experts_per_head": 8, "num_cdmoe_heads": 4, "expert_retrieval_size": 256}
        | {"auto_map": {"AutoConfig": "configuration_doge.DogeConfig"}, "is_moe": False, "rope_parameters": "absent"},
    ),
    "Bamba-9B": (
        make_bamba,
        {"attn_rotary_emb": 4, "partial_rotary_factor": 0.5, "rope_scaling": None, "rope_theta": 10000.0, "use_mamba_kernels": True}
        | {"num_logits_to_keep": 1, "mamba_chunk_size": 256, "z_loss_coefficient": 0.0, "rope_parameters": "absent"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_models_are_all_known(name, tmp_path):
    make, keys = PUBLISHED[name]
    model = make()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change_config(tmp_path, **(OLD | keys))
    imported = import_source(tmp_path)
    assert len(imported.cfg.layers) == model.config.num_hidden_layers
    assert imported.generation["tokens"]["bos"] == 1


NAMED = [
    (make_llama, {"attention_multiplier": 2.0}, ["attention_multiplier is 2.0", "does not know in a llama model", "remove it"]),
    (make_llama, {"logits_scaling": 8}, ["logits_scaling is 8"]),
    (make_llama, {"is_causal": False}, ["is_causal is False", "expected True"]),
    (make_llama, {"rope_thetta": 5e5}, ["rope_thetta is 500000.0", "did you mean rope_theta?"]),
    (make_llama, {"rms_norm_epsilon": 1e-3, "scale_emb": 12}, ["rms_norm_epsilon is 0.001", "nor scale_emb", "did you mean rms_norm_eps?"]),
    (make_llama, {"sliding_window": 4096}, ["sliding_window is 4096"]),
    (make_llama, {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types is ['sliding_attention'"]),
    (make_llama, {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, ["per_layer_config is {'1'"]),
    (make_llama, {"num_local_experts": 8}, ["num_local_experts is 8"]),
    (make_llama, {"rope_interleaved": True}, ["rope_interleaved is True"]),
    (make_llama, {"quantization": {"bits": 4}}, ["quantization is {'bits': 4}"]),
    (make_llama, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, ["rope_scaling.beta_fast is 32"]),
    (make_llama, {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 2]}}, ["rope_parameters.mrope_section is [1, 1, 2]"]),
    (make_llama, {"time_step_min": 0.001}, ["time_step_min is 0.001", "in a llama model"]),
    (make_doge, {"dynamic_mask_ratio": 0.5}, ["dynamic_mask_ratio is 0.5", "in a doge model"]),
    (make_doge, {"hidden_bias": True}, ["hidden_bias is True"]),
    (make_mamba2, {"mamba_rms_norm": True}, ["mamba_rms_norm is True", "in a mamba2 model"]),
    (make_mamba2, {"ssm_multipliers": [1, 2]}, ["ssm_multipliers is [1, 2]"]),
    (make_jamba, {"rope_theta": 1e4}, ["rope_theta is 10000.0", "in a jamba model"]),
    (make_bamba, {"attn_rotary_emb": 8}, ["attn_rotary_emb is 8", "expected 4"]),
    (make_bamba, {"embedding_multiplier": 12.0}, ["embedding_multiplier is 12.0", "in a bamba model"]),
]


@pytest.mark.parametrize(
    ("make", "changes", "words"), NAMED, ids=[f"{make.__name__} {next(iter(changes))}"[5:] for make, changes, _ in NAMED]
)
def test_key_that_could_change_the_model_is_named(make, changes, words, tmp_path):
    make().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", **changes)
    assert_refused(tmp_path / "source", "config.json", *words)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_unknown_key_that_is_switched_off_passes(value, tmp_path):
    make_llama().save_pretrained(tmp_path)
    change_config(tmp_path, some_window=value, logits_scaling=1.0, rope_scaling={"rope_type": "default", "rope_theta": 9.0, "beta": value})
    assert import_source(tmp_path).cfg.rope_theta == 9.0


def test_many_unknown_keys_make_one_short_line_and_exit_code_2(tmp_path, capfd):
    make_llama().save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", **{f"unheard_of_{index}": index for index in range(1, 100)})
    refused = wm(capfd, "import", tmp_path / "source", "-o", tmp_path / "made")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "unheard_of_1 is 1" in refused.err
    assert len(refused.err) < 500
    assert not (tmp_path / "made").exists()


def test_sampling_settings_of_transformers_are_harmless():
    assert GenerationConfig._get_default_generation_params().keys() <= HARMLESS


# Odd values for harmless keys, of the types that transformers wants.
ODD = {"time_step_floor": 0.3, "time_step_min": 0.2, "time_step_max": 0.4, "norm_topk_prob": True}
ODD |= {"residual_in_fp32": False, "partial_rotary_factor": 0.125, "time_step_init_scheme": "zeros", "rms_norm": False}
ODD_COMMON = {"attention_dropout": 0.5, "hidden_dropout": 0.5, "classifier_dropout": 0.5, "initializer_range": 0.7, "pretraining_tp": 2}
ODD_COMMON |= {"router_aux_loss_coef": 0.7, "z_loss_coefficient": 0.7, "chunk_size": 5, "mamba_chunk_size": 5, "chunk_size_feed_forward": 2}
ODD_COMMON |= {
    "num_logits_to_keep": 3,
    "n_ctx": 3,
    "use_associative_scan": False,
    "is_decoder": True,
    "max_sequence_length": 3,
    "use_cache": False,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_harmless_keys_do_not_change_the_logits_of_transformers(kind, tmp_path):
    model = MAKERS[kind](**({"num_experts": 1} if kind == "jamba" else {}))
    # The first is harmless in a Bamba of attention alone; the second is of initialisation, but transformers 5.17 scales loaded weights too.
    harmless = {*FAMILIES[kind].harmless.split()} - {"mamba_expand", "rescale_prenorm_residual"}
    model.save_pretrained(tmp_path)
    assert ODD_COMMON.keys() <= HARMLESS
    changes = {key: ODD.get(key, 3) for key in sorted(harmless)} | ODD_COMMON
    change_config(tmp_path, **changes)
    import_source(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).eval()
    assert {key: again.config.to_dict().get(key) for key in ODD_COMMON} == ODD_COMMON
    tokens = torch.randperm(96, generator=torch.Generator().manual_seed(0))[None, :23]
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
