"""onnxruntime-genai: its own generator on the model its builder made, greedy, with the cache in one shared buffer."""

import json

import protocol


class Genai:
    """A model of onnxruntime-genai's builder. `append_tokens` is its prefill."""

    def __init__(self, options):
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(options.model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": options.threads}}}}))
        self.model = og.Model(config)
        self.capacity = options.capacity
        self.generator = None

    def prefill(self, ids):
        """Empty the cache, feed the prompt, return the next token."""
        import numpy as np

        params = self.og.GeneratorParams(self.model)
        # With min_length no token ends the sequence early: every tool generates the same number.
        params.set_search_options(max_length=self.capacity, min_length=self.capacity, do_sample=False)
        self.generator = self.og.Generator(self.model, params)
        self.generator.append_tokens(np.array([ids], np.int32))
        return self.step(None)  # samples from the prompt's logits, without running the model

    def step(self, token):
        """Feed one token, return the next."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def text(self, prompt):
        """The first token of a prompt, as text."""
        tokenizer = self.og.Tokenizer(self.model)
        return tokenizer.decode([self.prefill(tokenizer.encode(prompt).tolist())])


protocol.run(Genai)
