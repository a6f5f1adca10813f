"""Gate with SiLU, then RMS-normalise."""

from wm_kernels.gated_rms_norm.definition import gated_rms_norm, gated_rms_norm_reference

__all__ = ["gated_rms_norm", "gated_rms_norm_reference"]
