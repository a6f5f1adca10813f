"""The declarations of all ops that travel, by name. Importing one imports Triton."""

from importlib import import_module
from importlib.util import find_spec
from typing import cast

from wm_kernels.native import Native

OPS = (
    "attention", "attention_rope", "causal_conv1d", "expert_mix", "gated_rms_norm", "keep_window_attention", "linear", "moe_mix",
    "product_key_topk", "residual_rms_norm", "rope", "rope_angles", "router_topk", "scored_attention", "selective_scan", "ssd_scan",
    "ssd_scan_rope",
)  # fmt: skip


def native_op(op: str) -> Native | None:
    """An op's declaration; None for one that has no kernel."""
    if op not in OPS or find_spec("triton") is None:
        return None
    return cast(Native, import_module(f"wm_kernels.{op}.native").NATIVE)
