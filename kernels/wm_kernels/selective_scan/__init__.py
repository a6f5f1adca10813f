"""The Mamba-1 recurrence, a decay per channel and state, over a run of tokens from an initial state."""

from wm_kernels.selective_scan.definition import selective_scan, selective_scan_, selective_scan_reference

__all__ = ["selective_scan", "selective_scan_", "selective_scan_reference"]
