"""The weighted sum of the chosen one-neuron experts."""

from wm_kernels.expert_mix.definition import expert_mix, expert_mix_reference

__all__ = ["expert_mix", "expert_mix_reference"]
