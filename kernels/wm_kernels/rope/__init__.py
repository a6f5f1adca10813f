"""Rotary position embedding in the half-split layout."""

from wm_kernels.rope.definition import rope, rope_reference

__all__ = ["rope", "rope_reference"]
