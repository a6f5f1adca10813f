"""What a Hugging Face architecture is to wm-graph: one table of tensors and one of config.json fields, read by import and export alike."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

from wm_graph.config import ModelConfig
from wm_graph.errors import CheckpointError, ConfigError
from wm_graph.importers.config_keys import refuse_unknown_keys
from wm_graph.importers.fields import REQUIRED, Fields
from wm_graph.importers.layout import Layout, make_layout

Values = dict[str, Any]


@dataclass(frozen=True)
class Same:
    """A field of config.json that is a field of ModelConfig under another name.

    Attributes:
        key: its name in config.json.
        name: its name in ModelConfig.
        default: what a missing or null entry means: a value, or a function of the ModelConfig fields before it; REQUIRED where that is an
            error.
    """

    key: str
    name: str
    default: Any = REQUIRED


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    Attributes:
        kind: its `model_type`.
        architecture: its class in transformers.
        mixers: what its layers mix with.
        feed_forwards: what follows.
        tensors: parameter name -> the tensors it is made of, in the order of its memory; `#` stands for the layer, `*` for the expert.
        same: fields that have one of the same meaning in ModelConfig.
        fixed: fields of which one value is supported, which a missing entry means too.
        read: (fields, the values of `same`) -> what else ModelConfig needs, or has otherwise.
        write: the inverse of `read`: what else config.json needs. A value that it cannot express shows when the result is read again.
        other: entries of `tensors` as some files have them instead, all or none.
        harmless: keys of config.json, separated by spaces, that need not be read, beside `config_keys.HARMLESS`.
    """

    kind: str
    architecture: str
    mixers: tuple[str, ...]
    feed_forwards: tuple[str, ...]
    tensors: Mapping[str, tuple[str, ...]]
    same: tuple[Same, ...]
    fixed: Mapping[str, Any]
    read: Callable[[Fields, Values], Values]
    write: Callable[[ModelConfig], Values]
    other: Mapping[str, tuple[str, ...]] | None = None
    harmless: str = ""


_KINDS = {field.name: field.type for field in dataclass_fields(ModelConfig)}


def read_config(family: Family, fields: Fields, name: str) -> ModelConfig:
    """The configuration in a config.json of the family.

    Raises:
        CheckpointError: a field is missing, of the wrong type, unknown, or asks for something that wm-graph does not have.
    """
    fields.require("quantization_config", None)
    fields.require("is_causal", True)  # on where it is missing; off, transformers attends to later tokens too
    for key, expected in family.fixed.items():
        fields.require(key, expected)
    values: Values = {"name": name}
    readers = {int: fields.integer, float: fields.number, bool: fields.flag}
    for same in family.same:
        default = same.default(values) if callable(same.default) else same.default
        values[same.name] = readers[_KINDS[same.name]](same.key, default)  # type: ignore[index]
    values |= family.read(fields, values)
    refuse_unknown_keys(fields, family.kind, family.harmless.split())
    return build_config(fields.label, **values)


def write_config(family: Family, cfg: ModelConfig) -> Values:
    """What `read_config` reads."""
    values = {"architectures": [family.architecture], "model_type": family.kind, "num_hidden_layers": len(cfg.layers)}
    return values | {same.key: getattr(cfg, same.name) for same in family.same} | family.write(cfg)


def build_config(label: str, **values: Any) -> ModelConfig:
    """A ModelConfig whose complaints name the imported file.

    Raises:
        CheckpointError: the values do not make a model.
    """
    try:
        return ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{label}: {error}") from error


def family_layout(family: Family, cfg: ModelConfig, stored: Collection[str] = ()) -> Layout:
    """The layout of a model as transformers writes it, or in the other form where a tensor of that is `stored`."""
    layout = make_layout(cfg, family.tensors)
    if not family.other:
        return layout
    other = make_layout(cfg, {**family.tensors, **family.other})
    differing = {piece.name for flat, parts in other.items() if parts != layout[flat] for piece in parts.pieces}
    return layout if differing.isdisjoint(stored) else other


def read_step_limits(fields: Fields) -> Values:
    """dt_min and dt_max from `time_step_limit`; transformers writes an infinite number as {"__float__": "Infinity"}."""
    limit = fields.get("time_step_limit")
    if limit is None:
        return {}
    least, largest = (_float(end) for end in limit) if isinstance(limit, list) and len(limit) == 2 else (math.nan, math.nan)
    if not (0.0 <= least < math.inf and largest > 0.0):
        raise fields.unsupported("time_step_limit", "[least, largest], numbers from 0, the second not 0 and possibly infinite")
    return {"dt_min": least, "dt_max": 0.0 if largest == math.inf else largest}


def write_step_limits(cfg: ModelConfig) -> Values:
    """The inverse of `read_step_limits`; no limit is transformers' default."""
    if not cfg.dt_min and not cfg.dt_max:
        return {}
    return {"time_step_limit": [cfg.dt_min, cfg.dt_max or {"__float__": "Infinity"}]}


def _float(value: Any) -> float:
    if value == {"__float__": "Infinity"}:
        return math.inf
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
