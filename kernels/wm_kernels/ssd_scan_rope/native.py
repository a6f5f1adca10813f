"""How `ssd_scan_rope` becomes launches."""

from wm_kernels.ssd_scan.native import TURNING as NATIVE

__all__ = ["NATIVE"]
