"""Make a Mamba2 of 115 M random parameters, with transformers' own logits to check others by: `python make_mamba2.py FOLDER`.

FOLDER is an ordinary Hugging Face folder. Its reference.json holds {"ids": a prompt, "tokens": what is fed after it, "logits": those that
transformers computes after the prompt and after each token}, all in one pass over the whole, so that no cache of its own is involved.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

PROMPT, STEPS = 512, 8


def main(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, conv_kernel=4, vocab_size=32000, tie_word_embeddings=True)).eval()
    stir(model)
    model.save_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (1, PROMPT + STEPS))
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, PROMPT - 1 :]
    reference = {"ids": ids[0, :PROMPT].tolist(), "tokens": ids[0, PROMPT:].tolist(), "logits": logits.tolist()}
    (folder / "reference.json").write_text(json.dumps(reference))


def stir(model):
    """Move what transformers starts at 0 or 1, so that leaving it out would show in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "mixer.D", "conv1d.bias")):
                parameter += 0.1 * torch.randn_like(parameter)


main(Path(sys.argv[1]))
