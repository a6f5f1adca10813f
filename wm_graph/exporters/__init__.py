"""Exporters: checkpoints written in the formats that `wm_graph.importers` reads, by the same tables.

`export_hf_folder` makes a Hugging Face folder of a checkpoint whose model transformers knows.
"""

from wm_graph.exporters.hf_folder import export_hf_folder

__all__ = ["export_hf_folder"]
