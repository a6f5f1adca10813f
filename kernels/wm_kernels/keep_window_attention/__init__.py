"""Softmax attention to the W best-scored keys so far, in W slots of state."""

from wm_kernels.keep_window_attention.definition import keep_window_attention, keep_window_attention_, keep_window_attention_reference

__all__ = ["keep_window_attention", "keep_window_attention_", "keep_window_attention_reference"]
