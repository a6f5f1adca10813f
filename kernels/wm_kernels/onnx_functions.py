"""All ops' ONNX faces in one place: TRANSLATIONS for torch.onnx.export, and the function bodies that make a file run with no library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir

from wm_kernels.attention import onnx_function as attention
from wm_kernels.attention_rope import onnx_function as attention_rope
from wm_kernels.causal_conv1d import onnx_function as causal_conv1d
from wm_kernels.expert_mix import onnx_function as expert_mix
from wm_kernels.gated_rms_norm import onnx_function as gated_rms_norm
from wm_kernels.keep_window_attention import onnx_function as keep_window_attention
from wm_kernels.moe_mix import onnx_function as moe_mix
from wm_kernels.onnx_body import DOMAIN, FLOAT, FLOAT16, OPSET, Flavour
from wm_kernels.product_key_topk import onnx_function as product_key_topk
from wm_kernels.residual_rms_norm import onnx_function as residual_rms_norm
from wm_kernels.rope import onnx_function as rope
from wm_kernels.rope_angles import onnx_function as rope_angles
from wm_kernels.router_topk import onnx_function as router_topk
from wm_kernels.scored_attention import onnx_function as scored_attention
from wm_kernels.selective_scan import onnx_function as selective_scan
from wm_kernels.ssd_scan import onnx_function as ssd_scan
from wm_kernels.ssd_scan_rope import onnx_function as ssd_scan_rope

__all__ = ["DOMAIN", "OPSET", "TRANSLATIONS", "Flavour", "bodies"]

_MODULES: dict[str, ModuleType] = {
    "wm::rope_angles": rope_angles,
    "wm::rope": rope,
    "wm::residual_rms_norm": residual_rms_norm,
    "wm::ssd_scan": ssd_scan,
    "wm::ssd_scan_rope": ssd_scan_rope,
    "wm::attention": attention,
    "wm::attention_rope": attention_rope,
    "wm::keep_window_attention": keep_window_attention,
    "wm::product_key_topk": product_key_topk,
    "wm::expert_mix": expert_mix,
    "wm::scored_attention": scored_attention,
    "wm::router_topk": router_topk,
    "wm::moe_mix": moe_mix,
    "wm::causal_conv1d": causal_conv1d,
    "wm::gated_rms_norm": gated_rms_norm,
    "wm::selective_scan": selective_scan,
}

TRANSLATIONS: Mapping[str, Callable[..., Any]] = {name: module.translation for name, module in _MODULES.items()}
"""Torch op name -> the function that writes its node, for `custom_translation_table`."""


def bodies(model: onnx.ModelProto | ir.Model, flavour: Flavour) -> list[onnx.FunctionProto]:
    """One function per Wm op type that the model's main graph uses, specialised to its nodes, in the order of TRANSLATIONS.

    Args:
        model: holds the nodes; their attributes and the dtype of their first input decide the bodies.
        flavour: "portable" for standard ops of opset 23, "ort" to allow com.microsoft ops.

    Returns:
        FunctionProtos of domain "wm"; those of flavour "ort" may import com.microsoft version 1.

    Raises:
        ValueError: two nodes of one op type need different bodies, or a node's dtype is missing or neither float32 nor float16.
    """
    if isinstance(model, onnx.ModelProto):
        model = ir.serde.deserialize_model(model)
    variants: dict[str, list[dict[str, Any]]] = {}
    for node in _nodes(model.graph):
        variants.setdefault(node.op_type, []).append(_variant(node))
    made = [module.body(flavour, variants.pop(module.OP_TYPE)) for module in _MODULES.values() if module.OP_TYPE in variants]
    if variants:
        raise ValueError(f"no body for wm op {', '.join(sorted(variants))}; known: {', '.join(m.OP_TYPE for m in _MODULES.values())}")
    return made


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph.all_nodes():
        if node.domain == DOMAIN:
            yield node


def _variant(node: ir.Node) -> dict[str, Any]:
    """What a body may depend on: attributes, absent inputs, and the file's dtype."""
    names = {module.OP_TYPE: [name for name, _ in module.INPUTS] for module in _MODULES.values()}.get(node.op_type, [])
    present = [value is not None for value in node.inputs] + [False] * len(names)
    variant: dict[str, Any] = {attribute.name: attribute.value for attribute in node.attributes.values()}
    variant["absent"] = tuple(name for name, there in zip(names, present, strict=False) if not there)
    if node.op_type != rope_angles.OP_TYPE:
        variant["dtype"] = _dtype(node)
    return variant


def _dtype(node: ir.Node) -> int:
    first = node.inputs[0]
    dtype = None if first is None or first.dtype is None else int(first.dtype)
    if dtype not in (FLOAT, FLOAT16):
        found = "no dtype" if dtype is None else onnx.TensorProto.DataType.Name(dtype)
        raise ValueError(f"{node.op_type} node {node.name!r}: first input must be float32 or float16, found {found}")
    return dtype
