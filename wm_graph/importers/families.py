"""The Hugging Face architectures that wm-graph reads and writes, by `model_type`."""

from wm_graph.importers import doge, llama, mamba2
from wm_graph.importers.family import Family

FAMILIES: dict[str, Family] = {family.kind: family for family in (llama.HUGGING_FACE, doge.HUGGING_FACE, mamba2.HUGGING_FACE)}
