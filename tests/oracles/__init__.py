"""The model and its ops once more, in float64, written to be read: loops, recurrences, one token at a time. No code is shared with the
references of wm_kernels or with wm_graph; a ModelConfig is read as data.

In reading order:

    functions.py         SiLU, softplus, RMS norm, softmax, the order of choices
    rotation.py          angles of positions and their scalings, the turn of a vector
    scanning.py          one step of the convolution and of both state space recurrences
    attending.py         cells of a cache, which of them a query sees, what it makes of them
    choosing.py          experts by product keys and by a router, and the sums over experts
    feed_forwards.py     gated MLP, mixture of experts, cross-domain mixture of experts
    scan_layers.py       the mixers that scan: Cheems' SSD, Mamba-2, Mamba-1
    attention_layers.py  the mixers that attend: plain, dynamic mask, inner function
    model.py             layers, residuals, embedding and head: `model_logits`
    ops.py               the same steps in loops over rows and tokens: one oracle per op, tensors in and out
"""

from oracles.model import Notes, model_logits
from oracles.ops import (
    attention,
    attention_rope,
    causal_conv1d,
    expert_mix,
    gated_rms_norm,
    keep_window_attention,
    linear,
    moe_mix,
    product_key_topk,
    residual_rms_norm,
    rope,
    rope_angles,
    router_topk,
    scored_attention,
    selective_scan,
    ssd_scan,
    ssd_scan_rope,
)

__all__ = [
    "Notes",
    "attention",
    "attention_rope",
    "causal_conv1d",
    "expert_mix",
    "gated_rms_norm",
    "keep_window_attention",
    "linear",
    "model_logits",
    "moe_mix",
    "product_key_topk",
    "residual_rms_norm",
    "rope",
    "rope_angles",
    "router_topk",
    "scored_attention",
    "selective_scan",
    "ssd_scan",
    "ssd_scan_rope",
]
