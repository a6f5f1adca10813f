"""The Hugging Face architectures that wm-graph reads and writes, by `model_type`."""

from wm_graph.importers import bamba, doge, jamba, llama, mamba2
from wm_graph.importers.family import Family

_MODULES = (llama, doge, mamba2, jamba, bamba)
FAMILIES: dict[str, Family] = {module.HUGGING_FACE.kind: module.HUGGING_FACE for module in _MODULES}
