"""wm_export: from a checkpoint to a bundle that runs without Python sources."""

from wm_export.bundle import export_bundle, export_into

__all__ = ["export_bundle", "export_into"]
