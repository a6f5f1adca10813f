"""The ops of wm-graph: importing this package registers every `wm::` op with PyTorch. Needs torch alone."""

from wm_kernels.attention import attention, attention_
from wm_kernels.attention_rope import attention_rope, attention_rope_
from wm_kernels.causal_conv1d import causal_conv1d, causal_conv1d_
from wm_kernels.expert_mix import expert_mix
from wm_kernels.gated_rms_norm import gated_rms_norm
from wm_kernels.keep_window_attention import keep_window_attention, keep_window_attention_
from wm_kernels.linear import linear
from wm_kernels.moe_mix import moe_mix
from wm_kernels.numerics import numerics
from wm_kernels.product_key_topk import product_key_topk
from wm_kernels.residual_rms_norm import residual_rms_norm
from wm_kernels.rope import rope
from wm_kernels.rope_angles import rope_angles
from wm_kernels.router_topk import router_topk
from wm_kernels.scored_attention import scored_attention, scored_attention_
from wm_kernels.selective_scan import selective_scan, selective_scan_
from wm_kernels.ssd_scan import ssd_scan, ssd_scan_
from wm_kernels.ssd_scan_rope import ssd_scan_rope, ssd_scan_rope_

__all__ = [
    "attention",
    "attention_",
    "attention_rope",
    "attention_rope_",
    "causal_conv1d",
    "causal_conv1d_",
    "expert_mix",
    "gated_rms_norm",
    "keep_window_attention",
    "keep_window_attention_",
    "linear",
    "moe_mix",
    "numerics",
    "product_key_topk",
    "residual_rms_norm",
    "rope",
    "rope_angles",
    "router_topk",
    "scored_attention",
    "scored_attention_",
    "selective_scan",
    "selective_scan_",
    "ssd_scan",
    "ssd_scan_",
    "ssd_scan_rope",
    "ssd_scan_rope_",
]
