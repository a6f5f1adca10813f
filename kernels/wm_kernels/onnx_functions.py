"""All ops' ONNX faces in one place: TRANSLATIONS for torch.onnx.export, and the function bodies that make a file run with no library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from wm_kernels.linear import onnx_function as linear
from wm_kernels.moe_mix import onnx_function as moe_mix
from wm_kernels.onnx_body import BFLOAT16, DOMAIN, FLOAT, FLOAT16, OPSET, Flavour
from wm_kernels.product_key_topk import onnx_function as product_key_topk
from wm_kernels.residual_rms_norm import onnx_function as residual_rms_norm
from wm_kernels.rope import onnx_function as rope
from wm_kernels.rope_angles import onnx_function as rope_angles
from wm_kernels.router_topk import onnx_function as router_topk
from wm_kernels.scored_attention import onnx_function as scored_attention
from wm_kernels.selective_scan import onnx_function as selective_scan
from wm_kernels.ssd_scan import onnx_function as ssd_scan
from wm_kernels.ssd_scan_rope import onnx_function as ssd_scan_rope

__all__ = ["DOMAIN", "OPSET", "TRANSLATIONS", "Flavour", "add_bodies"]

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
    "wm::linear": linear,
    "wm::selective_scan": selective_scan,
}
_BY_OP_TYPE: dict[str, ModuleType] = {module.OP_TYPE: module for module in _MODULES.values()}

TRANSLATIONS: Mapping[str, Callable[..., Any]] = {name: module.translation for name, module in _MODULES.items()}
"""Torch op name -> the function that writes its node, for `custom_translation_table`."""


def add_bodies(model: onnx.ModelProto, flavour: Flavour) -> None:
    """Replace the model's functions by the bodies of its Wm nodes, specialised to them, op by op in the order of TRANSLATIONS.

    Nodes of one op type share a body where theirs would be equal. An op's first body has no overload; others, in the order of their first
    nodes, are overloads "2", "3", ... of the function, as their nodes say too.

    Args:
        model: its main graph holds the nodes; their attributes, absent inputs and the dtype of their first input decide the bodies.
        flavour: "portable" for standard ops of opset 23, "ort" to allow com.microsoft ops, which the functions then import in version 1.

    Raises:
        ValueError: an op has no body, or a node's dtype is missing or none of float32, float16 and bfloat16.
    """
    twins = ir.serde.deserialize_model(model).graph  # the same nodes, whose inputs know their dtypes
    calls = [(node, _variant(twin)) for node, twin in zip(model.graph.node, twins, strict=True) if node.domain == DOMAIN]
    del model.functions[:]
    for op_type, module in _BY_OP_TYPE.items():
        nodes = [node for node, _ in calls if node.op_type == op_type]
        variants = [variant for node, variant in calls if node.op_type == op_type]
        if module is rope_angles:
            variants = rope_angles.share_tables(variants)
        model.functions.extend(_overloads(nodes, [module.body(flavour, one) for one in variants]))


def _overloads(nodes: Sequence[onnx.NodeProto], functions: Sequence[onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """The different ones among the nodes' functions, in order; each node is told its own."""
    made: dict[bytes, onnx.FunctionProto] = {}
    for node, function in zip(nodes, functions, strict=True):
        key = function.SerializeToString(deterministic=True)
        if made and key not in made:
            function.overload = str(len(made) + 1)
        node.ClearField("overload")
        if overload := made.setdefault(key, function).overload:  # the field is not written where it is not needed
            node.overload = overload
    return list(made.values())


def _variant(node: ir.Node) -> dict[str, Any]:
    """What a body may depend on: attributes, absent inputs, and the file's dtype."""
    if node.op_type not in _BY_OP_TYPE:
        raise ValueError(f"no body for wm op {node.op_type}; known: {', '.join(_BY_OP_TYPE)}")
    inputs = _BY_OP_TYPE[node.op_type].INPUTS
    present = [value is not None for value in node.inputs] + [False] * len(inputs)
    variant: dict[str, Any] = {attribute.name: attribute.value for attribute in node.attributes.values()}
    variant["absent"] = tuple(name for (name, _), there in zip(inputs, present, strict=False) if not there)
    if node.op_type != rope_angles.OP_TYPE:
        variant["dtype"] = _dtype(node)
    return variant


def _dtype(node: ir.Node) -> int:
    first = node.inputs[0]
    dtype = None if first is None or first.dtype is None else int(first.dtype)
    if dtype not in (FLOAT, FLOAT16, BFLOAT16):
        found = "no dtype" if dtype is None else onnx.TensorProto.DataType.Name(dtype)
        raise ValueError(f"{node.op_type} node {node.name!r}: first input must be float32, float16 or bfloat16, found {found}")
    return dtype
