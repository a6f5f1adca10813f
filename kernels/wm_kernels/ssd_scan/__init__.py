"""The state space duality recurrence over a run of tokens, from an initial state."""

from wm_kernels.ssd_scan.definition import ssd_scan, ssd_scan_, ssd_scan_reference

__all__ = ["ssd_scan", "ssd_scan_", "ssd_scan_reference"]
