"""Add a scaled residual, then RMS-normalise the sum."""

from wm_kernels.residual_rms_norm.definition import residual_rms_norm, residual_rms_norm_reference

__all__ = ["residual_rms_norm", "residual_rms_norm_reference"]
