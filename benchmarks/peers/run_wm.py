"""Ours, under the protocol of the peers: a session on a bundle. `cold` is not used: `wm generate` itself is timed."""

import protocol


class Session:
    """`wm_runtimes.open_session`, batch 1."""

    def __init__(self, options):
        from wm_runtimes import open_session

        settings = {"threads": options.threads} if options.runtime == "onnxruntime-cpu" else {}
        if not settings:
            import torch

            torch.set_num_threads(options.threads)
        self.session = open_session(options.model, runtime=options.runtime, batch=1, capacity=options.capacity, **settings)
        self.logits = None

    def prefill(self, ids):
        """Reset the session, feed the prompt, return the next token."""
        self.session.reset()
        self.logits = self.session.prefill([ids])[0, -1]
        return int(self.logits.argmax())

    def step(self, token):
        """Feed one token, return the next."""
        self.logits = self.session.decode([token])[0]
        return int(self.logits.argmax())


protocol.run(Session)
