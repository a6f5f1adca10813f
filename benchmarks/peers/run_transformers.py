"""transformers, eager: `model(...)` with its dynamic cache, logits of the last position only."""

from pathlib import Path

import protocol


class Transformers:
    """A model loaded from a safetensors folder in float32."""

    def __init__(self, options):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self.torch = torch
        self.folder = Path(options.model)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.cache = None

    def prefill(self, ids):
        """Empty the cache, feed the prompt, return the next token."""
        self.cache = None
        return self._forward(ids)

    def step(self, token):
        """Feed one token, return the next."""
        return self._forward([token])

    def text(self, prompt):
        """The first token of a prompt, as text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer.decode([self.prefill(tokenizer(prompt)["input_ids"])])

    def _forward(self, ids):
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


protocol.run(Transformers)
