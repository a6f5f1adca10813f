"""Causal softmax attention over a cache, with a score per key that is added to its logits or hides it."""

from wm_kernels.scored_attention.definition import scored_attention, scored_attention_, scored_attention_reference

__all__ = ["scored_attention", "scored_attention_", "scored_attention_reference"]
