"""A linear layer with what follows it: parts in tensors of their own, step sizes, a gate."""

from wm_kernels.linear.definition import linear, linear_reference

__all__ = ["linear", "linear_reference"]
