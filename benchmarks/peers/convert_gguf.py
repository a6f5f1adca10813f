"""Make a Hugging Face folder in float32 of a GGUF file: `python convert_gguf.py FILE.gguf FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source, folder):
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model that says it came quantised
    plain = type(loaded)(config).float()
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    # The converter's decoder makes onnxruntime-genai take a byte-level tokenizer for a SentencePiece one.
    change(folder / "tokenizer.json", decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True})
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


main(Path(sys.argv[1]), Path(sys.argv[2]))
