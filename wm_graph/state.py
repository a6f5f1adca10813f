"""Decode state as frozen dataclasses of tensors: explicit, passed in and returned, batch is axis 0 of every leaf.

B batch, H heads, K kv heads, A score heads, P head dim, N state, C channels, L taps, S cache capacity, W slots.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from wm_graph.config import ModelConfig
from wm_graph.config_checks import check_cache
from wm_graph.params import named_tensors
from wm_graph.shapes import state_leaves


@dataclass(frozen=True)
class SsdState:
    """State space layer: the recurrent state, float32 (float64 in a float64 model)."""

    ssd: Tensor  # BHNP


@dataclass(frozen=True)
class Mamba2State:
    """Mamba-2 layer: the last inputs of the convolution and the recurrent state, float32."""

    conv: Tensor  # B(L-1)C
    ssd: Tensor  # BHNP


@dataclass(frozen=True)
class Mamba1State:
    """Mamba-1 layer: the last inputs of the convolution and the recurrent state, float32."""

    conv: Tensor  # B(L-1)C
    scan: Tensor  # BCN


@dataclass(frozen=True)
class AttentionState:
    """Attention layer: key and value caches in the model's dtype; cells at or past the position are undefined."""

    k: Tensor  # BKSP
    v: Tensor  # BKSP


@dataclass(frozen=True)
class ScoredAttentionState:
    """Attention whose keys carry scores: key, value and score caches; cells at or past the position are undefined."""

    k: Tensor  # BKSP
    v: Tensor  # BKSP
    score: Tensor  # BAS, float32


@dataclass(frozen=True)
class KeepWindowState:
    """Dynamic-mask attention layer: the W best-ranked keys so far, in no meaningful order; empty slots have position -1."""

    k: Tensor  # BKWP
    v: Tensor  # BKWP
    score: Tensor  # BKW, float32, empty: -inf
    slot_position: Tensor  # BKW, int64, empty: -1


LayerState = SsdState | Mamba2State | Mamba1State | AttentionState | ScoredAttentionState | KeepWindowState
# The leaves of a layer tell its kind of state.
_STATES: tuple[type[LayerState], ...] = (SsdState, Mamba2State, Mamba1State, AttentionState, ScoredAttentionState, KeepWindowState)
_BY_LEAVES = {frozenset(field.name for field in fields(cls)): cls for cls in _STATES}


@dataclass(frozen=True)
class State:
    """Everything a model remembers between calls."""

    position: Tensor  # B, int64: tokens seen by each row
    layers: tuple[LayerState, ...]


for _cls in (*_STATES, State):
    torch.export.register_dataclass(_cls, serialized_type_name=f"wm_graph.{_cls.__name__}")


def leaf_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state leaf of the given kind in a model of the given dtype."""
    if kind in ("position", "slot_position"):
        return torch.int64
    return dtype if kind in ("kv", "slot") else torch.promote_types(dtype, torch.float32)


def zero_state(
    cfg: ModelConfig,
    batch: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> State:
    """The state before any token.

    Args:
        cfg: the model.
        batch: rows.
        capacity: most tokens a row can hold; attention caches are this long, windows at most this long.
        dtype: the model's dtype.
        device: where to put it.

    Raises:
        ConfigError: the model has dynamic RoPE scaling and does not allow a state.
    """
    check_cache(cfg)
    leaves = {
        spec.name: torch.full(
            spec.concrete_shape(batch, capacity, cfg.keep_window), spec.reset, dtype=leaf_dtype(spec.kind, dtype), device=device
        )
        for spec in state_leaves(cfg)
    }
    return state_from_flat(cfg, leaves)


def state_from_flat(cfg: ModelConfig, leaves: dict[str, Tensor]) -> State:
    """Nest flat named leaves (the names of `state_leaves`); no copy is made."""

    def layer(index: int) -> LayerState:
        prefix = f"layers.{index}."
        found = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
        return _BY_LEAVES[frozenset(found)](**found)

    return State(leaves["position"], tuple(layer(index) for index in range(len(cfg.layers))))


def state_to_flat(cfg: ModelConfig, state: State) -> dict[str, Tensor]:
    """The inverse of `state_from_flat`, in the order of `state_leaves`."""
    found = dict(named_tensors(state))
    return {spec.name: found[spec.name] for spec in state_leaves(cfg)}
