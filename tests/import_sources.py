"""Small sources for the import tests: random transformers models, and GGUF files written from them."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM

from wm_graph.importers import import_source, write_imported

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}


def make_llama(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return randomised(LlamaForCausalLM(LlamaConfig(**(SIZES | options)))).to(dtype)


def make_doge(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    config = DogeConfig(**(SIZES | {"keep_window_size": 12} | options))
    config._attn_implementation = "eager"  # sdpa of Doge is not causal in transformers 5.17
    return randomised(DogeForCausalLM(config)).to(dtype)


def randomised(model):
    """Norms and residual scales off 1 and A off 0, so that mixing two of them up shows, and no scores tie."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def convert(source, directory):
    """Import and write, as `wm import` does."""
    write_imported(import_source(source), directory)


def rows_for_gguf(weight, heads):
    """The row order in which llama.cpp's converter stores queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model):
    """GGUF name -> float32 array, as llama.cpp's converter would name and order them."""
    config = model.config
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {
        f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")
    }
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name in ends:
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                tensors[ends[name]] = array
            continue
        index, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        short = names[part]
        tensors[f"blk.{index}.{short}.weight"] = rows_for_gguf(array, heads[short]) if short in heads else array
    return tensors


def write_gguf(path: Path, model, kind="F32", *, metadata=None, tensors=None, raw_kind=None, vocabulary=None):
    """A GGUF file of a transformers Llama.

    `kind` is the type of the matrices; `metadata` adds or replaces (None: leaves out) keys; `tensors` replaces the tensors, where bytes are
    blocks of `raw_kind`; `vocabulary` is a function that adds tokenizer keys to the writer.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    keys = {
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    } | (metadata or {})
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    if vocabulary is not None:
        vocabulary(writer)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, array in (gguf_tensors(model) if tensors is None else tensors).items():
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType[raw_kind])
        elif array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_vocabulary(pre, merges=("h e",), specials=("<|im_start|>", "<|im_end|>"), **settings):
    """Adds a byte-level vocabulary of the 256 bytes, the merged pieces and special tokens."""
    from wm_graph.data.make_tokenizer import byte_characters

    tokens = [*specials, *byte_characters(), *(merge.replace(" ", "") for merge in merges)]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(specials) + [1] * (len(tokens) - len(specials)))
        writer.add_token_merges(list(merges))
        for name, value in settings.items():
            getattr(writer, f"add_{name}")(value)

    return add


def tokenizer_of(source) -> Tokenizer:
    return Tokenizer.from_str(import_source(source).tokenizer_json)
