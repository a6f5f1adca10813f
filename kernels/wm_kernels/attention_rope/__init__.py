"""Causal attention over a cache, with rotary positions, from the packed projection."""

from wm_kernels.attention_rope.definition import attention_rope, attention_rope_, attention_rope_reference

__all__ = ["attention_rope", "attention_rope_", "attention_rope_reference"]
