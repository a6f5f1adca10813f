"""mobius-onnx: a graph that `mobius build` made, run by onnxruntime with OrtValues, so that nothing is copied between steps."""

from pathlib import Path

import protocol


class Mobius:
    """A decoder with inputs input_ids, attention_mask, past_key_values.*; its cache grows by concatenation."""

    def __init__(self, options):
        import numpy as np
        import onnxruntime as ort

        self.np, self.ort, self.folder = np, ort, Path(options.model)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self.session = ort.InferenceSession(str(self.folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node.shape for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.cache, self.length = {}, 0

    def prefill(self, ids):
        """Empty the cache, feed the prompt, return the next token."""
        np = self.np
        shapes = {name: shape for name, shape in self.inputs.items() if name.startswith("past_key_values.")}
        self.cache = {name: self._value(np.zeros((1, shape[1], 0, shape[3]), np.float32)) for name, shape in shapes.items()}
        self.length = 0
        return self._forward(ids)

    def step(self, token):
        """Feed one token, return the next."""
        return self._forward([token])

    def text(self, prompt):
        """The first token of a prompt, as text."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        return tokenizer.decode([self.prefill(tokenizer.encode(prompt).ids)])

    def _forward(self, ids):
        np = self.np
        end = self.length + len(ids)
        arrays = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end)[None],
        }
        feed = {name: self._value(array) for name, array in arrays.items() if name in self.inputs}
        found = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, {**feed, **self.cache}), strict=True))
        self.cache = {name.replace("present.", "past_key_values."): value for name, value in found.items() if name != "logits"}
        self.length = end
        return int(found["logits"].numpy()[0, -1].argmax())

    def _value(self, array):
        return self.ort.OrtValue.ortvalue_from_numpy(array)


protocol.run(Mobius)
