"""Cosines and sines of the rotary angles, exact to position 2^24."""

from wm_kernels.rope_angles.definition import rope_angles, rope_angles_reference

__all__ = ["rope_angles", "rope_angles_reference"]
