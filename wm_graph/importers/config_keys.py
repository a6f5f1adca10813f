"""Keys of a config.json that wm-graph need not read, and the refusal of all others.

A key that nobody reads may change the model: a factor on the logits, a window, a misspelt `rope_theta`. So a key counts as harmless only
if it stands here, or with its family, for a reason; each was looked up in transformers 5.17, whose logits are the measure.
"""

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from wm_graph.errors import CheckpointError
from wm_graph.importers.fields import Fields, clip

# What the file is and who wrote it. transformers' own private entries begin with "_" and are harmless too.
_ORIGIN = """architectures auto_map custom_pipelines dtype library_name model_type name_or_path task_specific_params tokenizer_class
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version"""

# Tokens and sampling: they choose what follows from the logits. Those that count are read for generation.json.
_TOKENS = "bos_token bos_token_id decoder_start_token_id eos_token eos_token_id pad_token pad_token_id prefix sep_token_id unk_token_id"
_SAMPLING = """assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p use_cache"""

# Training: first values, dropout, losses, and the labels of classifiers, whose heads are tensors of their own.
_TRAINING = """attention_dropout classifier_dropout embedding_dropout finetuning_task gradient_checkpointing hidden_dropout id2label
    initializer_range label2id neftune_noise_alpha num_labels output_router_logits problem_type resid_pdrop residual_dropout
    router_aux_loss_coef tf_legacy_loss z_loss_coefficient"""

# How a computation is done and what is handed out, not which one: kernels, chunks, splitting over machines, lengths that nothing enforces.
_RUNNING = """attn_implementation calc_logits_for_entire_prompt chunk_size chunk_size_feed_forward experts_implementation is_decoder
    logits_to_keep mamba_chunk_size max_sequence_length model_max_length n_ctx num_logits_to_keep output_attentions output_hidden_states
    pretraining_tp return_dict torchscript use_associative_scan use_bfloat16 use_flash_attention use_flash_attention_2 use_mamba_kernels
    use_mambapy"""

HARMLESS = frozenset(f"{_ORIGIN} {_TOKENS} {_SAMPLING} {_TRAINING} {_RUNNING}".split())

# Factors of other architectures, which do nothing at this value.
_NEUTRAL = {"embedding_multiplier": 1, "logit_scale": 1, "logits_scaling": 1, "residual_multiplier": 1, "rope_ratio": 1}


def refuse_unknown_keys(fields: Fields, kind: str, harmless: Collection[str]) -> None:
    """Refuse entries that nothing has asked for, unless they are harmless or switched off.

    Args:
        fields: a config.json, read to the end.
        kind: its `model_type`.
        harmless: keys beside `HARMLESS`.

    Raises:
        CheckpointError: there is such an entry.
    """
    known = {*HARMLESS, *harmless}
    unknown = [key for key, value in fields.unasked().items() if key not in known and not key.startswith("_") and _may_matter(key, value)]
    if not unknown:
        return
    key, others = unknown[0], f" (nor {clip(', '.join(unknown[1:]))[1:-1]})" if unknown[1:] else ""
    meant = get_close_matches(key.rsplit(".", 1)[-1], fields.asked(), 1, 0.8)
    hint = f"did you mean {meant[0]}? " if meant else ""
    raise CheckpointError(
        f"{fields.label}: {key} is {clip(fields.unasked()[key])}, which wm-graph does not know in a {kind} model{others}; "
        f"expected only keys that it reads or that change no logits; {hint}remove it if the logits do not depend on it"
    )


def _may_matter(key: str, value: Any) -> bool:
    """Whether a value could change something: null, false, 0 and what is empty switch a thing off."""
    return bool(value) and _NEUTRAL.get(key) != value
