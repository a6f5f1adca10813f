"""The frozen table of launch configurations: each op's `triton_configs.json`, of what the tuner measured, only read here.

A row holds `arch`, `dtype`, `regime` and `dims`, each of which a call must match where the row names it, and the values to use: tiles,
`num_warps`, `num_stages`. The first matching row wins, so that the last rows, which name the regime alone, serve everything else.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@cache
def _rows(op: str) -> tuple[Mapping[str, Any], ...]:
    text = files("wm_kernels").joinpath(op, "triton_configs.json").read_text(encoding="utf-8")
    return tuple(MappingProxyType(row) for row in json.loads(text))


@cache
def config(op: str, arch: str, dtype: str, regime: str, dims: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    """The values of the first row that matches.

    Args:
        op: name without `wm::`.
        arch: `sm_90`, or `interpreter`.
        dtype: `float32`, `float16` or `bfloat16`.
        regime: one of the op's regimes.
        dims: (letter, size) of the dimensions that decide.

    Raises:
        LookupError: no row matches.
    """
    sizes = dict(dims)
    for row in _rows(op):
        given = {"arch": arch, "dtype": dtype, "regime": regime}
        if all(row.get(key, value) == value for key, value in given.items()) and all(
            sizes.get(letter) == size for letter, size in row.get("dims", {}).items()
        ):
            return MappingProxyType(dict(row["values"]))
    raise LookupError(f"wm::{op}: no configuration for {arch}, {dtype}, {regime}, {sizes}; add a row to its triton_configs.json")
