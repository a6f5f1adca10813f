"""mobius-onnx with states of fixed size: a graph that `mobius build` made of a Mamba2, its states bound once, in place, for every step."""

from pathlib import Path

import protocol


class MobiusStates:
    """A decoder with inputs input_ids and past_states.*, outputs logits and present.*.

    One buffer is input and output of a state: onnxruntime's LinearAttention and CausalConvWithState read it before they write it.
    """

    def __init__(self, options):
        import numpy as np
        import onnxruntime as ort

        self.np, self.ort = np, ort
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self.session = ort.InferenceSession(str(Path(options.model) / "model.onnx"), settings, providers=["CPUExecutionProvider"])
        nodes = [node for node in self.session.get_inputs() if node.name != "input_ids"]
        self.states = {node.name: np.zeros((1, *node.shape[1:]), np.float32) for node in nodes}
        self.vocabulary = self.session.get_outputs()[0].shape[-1]
        self.bindings = {}
        self.logits = None

    def prefill(self, ids):
        """Empty the states, feed the prompt, return the next token."""
        for state in self.states.values():
            state[...] = 0
        return self._forward(ids)

    def step(self, token):
        """Feed one token, return the next."""
        return self._forward([token])

    def _forward(self, ids):
        if len(ids) not in self.bindings:
            self.bindings[len(ids)] = self._bind(len(ids))
        binding, input_ids, logits = self.bindings[len(ids)]
        input_ids[0] = ids
        self.session.run_with_iobinding(binding)
        self.logits = logits[0, -1]
        return int(self.logits.argmax())

    def _bind(self, length):
        """A binding for so many tokens, with the arrays to write them to and read logits from."""
        np, value = self.np, self.ort.OrtValue.ortvalue_from_numpy
        binding = self.session.io_binding()
        input_ids, logits = np.zeros((1, length), np.int64), np.zeros((1, length, self.vocabulary), np.float32)
        binding.bind_ortvalue_input("input_ids", value(input_ids))
        binding.bind_ortvalue_output("logits", value(logits))
        for name, state in self.states.items():
            binding.bind_ortvalue_input(name, value(state))
            binding.bind_ortvalue_output(name.replace("past_states.", "present."), value(state))
        return binding, input_ids, logits


protocol.run(MobiusStates)
