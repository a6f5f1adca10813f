"""The state space duality recurrence with B and C rotated by position."""

from wm_kernels.ssd_scan_rope.definition import ssd_scan_rope, ssd_scan_rope_, ssd_scan_rope_reference

__all__ = ["ssd_scan_rope", "ssd_scan_rope_", "ssd_scan_rope_reference"]
