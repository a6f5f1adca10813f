"""FAULTS: every planted fault, of ONNX files and of torch runtimes, and CONFIGS: the models that show them."""

from dataclasses import replace

from faults import Fault
from faults_onnx import ONNX_FAULTS
from faults_torch import TORCH_FAULTS
from helpers import COMPILED_FAMILIES, FAMILIES, OPTIONS
from wm_graph.config import ModelConfig

_OTHERS = {
    "llama-tiny, scaled rotation": replace(
        FAMILIES["llama-tiny"], layers=(("attention", "mlp"),) * 2, rope_scaling="linear", rope_factor=4.0
    ),
    **{f"compiled {name}": cfg for name, cfg in COMPILED_FAMILIES.items()},
}
CONFIGS: dict[str, ModelConfig] = FAMILIES | OPTIONS | _OTHERS
FAULTS: tuple[Fault, ...] = ONNX_FAULTS + TORCH_FAULTS
