"""Parameters as nested frozen dataclasses of tensors, registered as pytrees.

D model width, V vocabulary, H heads, K kv heads, P head dim, f hidden width, R retrieval heads, J sub-keys, E experts.
Linear weights are [out, in]. Static numbers live in ModelConfig, never here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError
from wm_graph.shapes import parameter_shapes


@dataclass(frozen=True)
class SsdParams:
    """State space mixer: merged projections C | B | x | dt, log decay rates A_log_H, output projection."""

    in_proj: Tensor
    A_log: Tensor
    out_proj: Tensor


@dataclass(frozen=True)
class Mamba2Params:
    """Mamba-2: merged projections z | x | B | C | dt, convolution over x | B | C, skip D_H, gated norm."""

    in_proj: Tensor
    conv_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor
    out_proj: Tensor
    conv_bias: Tensor | None = None
    in_proj_bias: Tensor | None = None
    out_proj_bias: Tensor | None = None


@dataclass(frozen=True)
class Mamba1Params:
    """Mamba-1: merged projections x | z, convolution over x, dt | B | C made from x, skip D_C; Jamba's norms of dt, B and C."""

    in_proj: Tensor
    conv_weight: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    conv_bias: Tensor | None = None
    in_proj_bias: Tensor | None = None
    out_proj_bias: Tensor | None = None
    dt_norm: Tensor | None = None
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None


@dataclass(frozen=True)
class AttentionParams:
    """Attention: merged q | k | v, output projection, optional biases, optional norms over the head dim."""

    qkv: Tensor
    out: Tensor
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class DynamicMaskAttentionParams:
    """Attention with a content score per key and score head: score = exp(A softplus(v dt^T))."""

    qkv: Tensor
    out: Tensor
    dt: Tensor
    A: Tensor
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class InnerFunctionAttentionParams:
    """Attention whose values are the input gated by retrieved vectors: merged q | k, retrieval, static mask by head and position."""

    qk: Tensor
    out: Tensor
    value_query: Tensor
    value_keys: Tensor
    value_embed: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class MlpParams:
    """Gated MLP: merged gate | up [2f, D], down [D, f], optional biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class MoeParams:
    """Routed experts: router [E, D], expert matrices; in the form of shared expert isolation biases and a gated shared expert."""

    router: Tensor
    expert_in: Tensor
    expert_out: Tensor
    expert_in_bias: Tensor | None = None
    expert_out_bias: Tensor | None = None
    shared_in: Tensor | None = None
    shared_in_bias: Tensor | None = None
    shared_out: Tensor | None = None
    shared_out_bias: Tensor | None = None
    shared_gate: Tensor | None = None


@dataclass(frozen=True)
class CdmoeParams:
    """Cross-domain mixture of experts: shared MLP (gate_up, or up alone), retrieval (query and keys, or router), expert tables."""

    down: Tensor
    expert_down: Tensor
    expert_up: Tensor
    gate_up: Tensor | None = None
    up: Tensor | None = None
    query: Tensor | None = None
    keys: Tensor | None = None
    router: Tensor | None = None


Mixer = SsdParams | Mamba2Params | Mamba1Params | AttentionParams | DynamicMaskAttentionParams | InnerFunctionAttentionParams
FeedForward = MlpParams | MoeParams | CdmoeParams
_MIXERS: dict[str, type[Mixer]] = {
    "ssd": SsdParams,
    "mamba2": Mamba2Params,
    "mamba1": Mamba1Params,
    "attention": AttentionParams,
    "dynamic_mask_attention": DynamicMaskAttentionParams,
    "inner_function_attention": InnerFunctionAttentionParams,
}
_FEED_FORWARDS: dict[str, type[FeedForward]] = {"mlp": MlpParams, "moe": MoeParams, "cdmoe": CdmoeParams}


@dataclass(frozen=True)
class LayerParams:
    """A mixer and, unless there is none, a feed-forward, each with its norm and, where learned, the scale of its skip branch."""

    mixer_norm: Tensor
    mixer: Mixer
    feed_forward_norm: Tensor | None = None
    feed_forward: FeedForward | None = None
    mixer_residual: Tensor | None = None
    feed_forward_residual: Tensor | None = None


@dataclass(frozen=True)
class Params:
    """A whole model. `head` is None when the embedding is the head."""

    embedding: Tensor
    layers: tuple[LayerParams, ...]
    norm: Tensor
    head: Tensor | None = None


for _cls in (*_MIXERS.values(), *_FEED_FORWARDS.values(), LayerParams, Params):
    torch.export.register_dataclass(_cls, serialized_type_name=f"wm_graph.{_cls.__name__}")


def is_float32_always(name: str) -> bool:
    """Whether the parameter keeps float32 in a half-precision model: decay rates, whose exponent is taken."""
    return name.rsplit(".", 1)[-1] in ("A_log", "A")


def init_params(cfg: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Params:
    """Random parameters, the same for a seed and configuration in every dtype up to rounding.

    Weights and keys N(0, 0.02^2); norms, residual scales, skips D and static masks 1; biases and A 0; A_log = log(1..H), of Mamba-1
    log(1..N); convolutions and dt_proj uniform within 1/sqrt(fan-in); dt_bias such that softplus(dt_bias) is log-uniform in 0.001..0.1.

    Source:
        arXiv:2412.11834, reference initialisation; keys as arXiv:2407.04153; dt_bias and convolutions as arXiv:2312.00752.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: draw(name.rsplit(".", 1)[-1], shape, generator) for name, shape in parameter_shapes(cfg).items()}
    return cast_params(params_from_flat(cfg, tensors), dtype)


def draw(leaf: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A new float32 parameter, by the last part of its name; see `init_params`."""
    if leaf == "A_log":
        return torch.log(torch.arange(1, shape[-1] + 1, dtype=torch.float64)).float().expand(shape).clone()
    if leaf == "dt_bias":
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator).exp()
        return torch.log(torch.expm1(step)).float()  # the inverse of softplus
    if leaf in ("conv_weight", "dt_proj"):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if leaf == "A" or leaf.endswith("bias"):
        return torch.zeros(shape)
    if leaf.endswith(("norm", "residual")) or leaf in ("D", "mask"):
        return torch.ones(shape)
    return torch.empty(shape).normal_(0.0, 0.02, generator=generator)


def params_from_flat(cfg: ModelConfig, tensors: dict[str, Tensor]) -> Params:
    """Nest flat named tensors; no copy is made.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the configuration says; the message names it.
    """
    shapes = parameter_shapes(cfg)
    if missing := [name for name in shapes if name not in tensors]:
        raise CheckpointError(f"tensor {missing[0]!r} is missing, expected by configuration {cfg.name!r} ({len(missing)} in all)")
    if unknown := [name for name in tensors if name not in shapes]:
        raise CheckpointError(f"tensor {unknown[0]!r} is unknown to configuration {cfg.name!r} ({len(unknown)} in all)")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(found)}, configuration {cfg.name!r} expects {list(shape)}")
    layers = tuple(_layer_from_flat(pair, f"layers.{index}", tensors) for index, pair in enumerate(cfg.layers))
    return Params(tensors["embedding"], layers, tensors["norm"], tensors.get("head"))


def _layer_from_flat(pair: tuple[str, str], prefix: str, tensors: dict[str, Tensor]) -> LayerParams:
    def part(cls: type, name: str) -> Any:
        return cls(**{field.name: tensors.get(f"{prefix}.{name}.{field.name}") for field in fields(cls)})

    return LayerParams(
        mixer_norm=tensors[f"{prefix}.mixer_norm"],
        mixer=part(_MIXERS[pair[0]], "mixer"),
        feed_forward_norm=tensors.get(f"{prefix}.feed_forward_norm"),
        feed_forward=None if pair[1] == "none" else part(_FEED_FORWARDS[pair[1]], "feed_forward"),
        mixer_residual=tensors.get(f"{prefix}.mixer_residual"),
        feed_forward_residual=tensors.get(f"{prefix}.feed_forward_residual"),
    )


def params_to_flat(cfg: ModelConfig, params: Params) -> dict[str, Tensor]:
    """The inverse of `params_from_flat`, in model order."""
    found = dict(named_tensors(params))
    return {name: found[name] for name in parameter_shapes(cfg)}


def named_tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor under a dataclass or tuple of them, with its dotted path; None is skipped."""
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, tuple):
        for index, child in enumerate(node):
            yield from named_tensors(child, f"{prefix}.{index}" if prefix else str(index))
    elif node is not None:
        for field in fields(node):
            yield from named_tensors(getattr(node, field.name), f"{prefix}.{field.name}" if prefix else field.name)


def map_tensors(node: Any, change: Callable[[str, Tensor], Tensor], prefix: str = "") -> Any:
    """A copy of a parameter (sub)tree with every tensor replaced by `change(path, tensor)`."""
    if node is None:
        return None
    if isinstance(node, Tensor):
        return change(prefix, node)
    if isinstance(node, tuple):
        return tuple(map_tensors(child, change, f"{prefix}.{index}" if prefix else str(index)) for index, child in enumerate(node))
    names = [field.name for field in fields(node)]
    return type(node)(**{name: map_tensors(getattr(node, name), change, f"{prefix}.{name}" if prefix else name) for name in names})


def cast_params(node: Any, dtype: torch.dtype) -> Any:
    """A parameter (sub)tree in another dtype; decay rates stay at least float32."""
    high = torch.promote_types(dtype, torch.float32)
    return map_tensors(node, lambda name, tensor: tensor.to(high if is_float32_always(name) else dtype))


def parameter_count(params: Params) -> int:
    """Number of parameters held."""
    return sum(math.prod(tensor.shape) for _, tensor in named_tensors(params))
