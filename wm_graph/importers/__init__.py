"""Importers: models in other formats, brought into the layout of wm-graph checkpoints.

`import_source` reads a GGUF file of the Llama family or a Hugging Face folder of an architecture in `families`; `write_imported` makes a
checkpoint of it.
"""

from wm_graph.importers.imported import Imported, write_imported
from wm_graph.importers.sources import import_source

__all__ = ["Imported", "import_source", "write_imported"]
