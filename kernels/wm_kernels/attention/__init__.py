"""Causal softmax attention over a cache of fixed capacity."""

from wm_kernels.attention.definition import attention, attention_, attention_reference

__all__ = ["attention", "attention_", "attention_reference"]
