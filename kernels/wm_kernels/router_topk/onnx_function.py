"""WmRouterTopk: the k likeliest experts of each token.

    p = softmax(logits) over all E        weight = p of the k largest        normalize: weight / sum of the k

Order: larger logit, then lower expert index.

Letters: M tokens, E experts, k picks.
"""

from __future__ import annotations

from typing import Any

import onnx

from wm_kernels.onnx_body import Body, Flavour
from wm_kernels.onnx_schema import FLOAT_T, INT64, wm_op

OP_TYPE = "WmRouterTopk"
INPUTS = [("logits_ME", FLOAT_T)]
OUTPUTS = [("weight_Mk", FLOAT_T), ("expert_Mk", INT64)]
_node = wm_op(OP_TYPE, INPUTS, OUTPUTS, {"k": int, "normalize": int})


def translation(logits_ME: Any, k: int, normalize: bool) -> Any:
    """torch.ops.wm.router_topk to its node."""
    return _node(logits_ME, k=k, normalize=int(normalize))


def body(flavour: Flavour, one: dict[str, Any]) -> onnx.FunctionProto:
    """The function, for one k."""
    g = Body(OP_TYPE, [name for name, _ in INPUTS], one["dtype"], flavour)
    (logits_ME,) = g.all_inputs()
    wide_ME = g.f32(logits_ME)
    best_Mk, expert_Mk = g.TopK(wide_ME, [one["k"]], axis=-1, outs=2)
    weight_Mk = g.Softmax(best_Mk, axis=-1) if one["normalize"] else g.pick(g.Softmax(wide_ME, axis=-1), expert_Mk)
    return g.function({"weight_Mk": g.narrow(weight_Mk), "expert_Mk": expert_Mk})
