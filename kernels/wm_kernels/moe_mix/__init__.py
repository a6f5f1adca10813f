"""The weighted sum of the chosen experts of a mixture, each a small feed-forward network."""

from wm_kernels.moe_mix.definition import moe_mix, moe_mix_reference

__all__ = ["moe_mix", "moe_mix_reference"]
