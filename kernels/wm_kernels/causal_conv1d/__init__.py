"""Depthwise causal convolution over a run of tokens, from the inputs before it."""

from wm_kernels.causal_conv1d.definition import causal_conv1d, causal_conv1d_, causal_conv1d_reference

__all__ = ["causal_conv1d", "causal_conv1d_", "causal_conv1d_reference"]
