"""`plans.json`: traced plans as a loader without Python reads them, and what a call comes to by them.

The format is described in docs/plans.md.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wm_kernels.expressions import as_json, evaluate
from wm_kernels.native import Native, NotServedError, Use, Variant, call_of, shape_of, trace
from wm_kernels.symbolic import TraceError, of
from wm_kernels.triton_support import dtype_name

FILE = "plans.json"
SCHEMA = 2
MOST_VARIANTS = 256  # of an entry
_BLANK = "0" * 64  # in the place of the digest


class PlansError(Exception):
    """Plans that are damaged, or that serve no such call; one line says which."""


@dataclass(frozen=True)
class Entry:
    """An op as one graph uses it, for all architectures.

    Attributes:
        declared: the op.
        use: how it is called.
        in_place: whether outputs take the place of the inputs that they may alias.
        variants: with the architectures that each is for.
    """

    declared: Native
    use: Use
    in_place: bool
    variants: tuple[tuple[tuple[str, ...], Variant], ...]


def entries_of(declared: Native, use: Use, architectures: Sequence[str]) -> list[Entry]:
    """The entries of a use: one where the state is written in place, and another where it is not and kernels can do without a copy.

    Raises:
        NotServedError: no kernel serves this use.
        TraceError: its plan cannot be traced, or has too many variants.
    """
    aliases = any(output.alias in dict(use.dtypes) for output in declared.outputs)
    return [_entry(declared, use, architectures, way) for way in ((True, False) if aliases and declared.apart else (aliases,))]


def _entry(declared: Native, use: Use, architectures: Sequence[str], in_place: bool) -> Entry:
    found: dict[Variant, list[str]] = {}
    for architecture in architectures:
        for variant in trace(declared, use, architecture, in_place):
            found.setdefault(variant, []).append(architecture)
    if len(found) > MOST_VARIANTS:
        raise TraceError(f"wm::{declared.op}: {len(found)} variants of all architectures, expected at most {MOST_VARIANTS}")
    return Entry(declared, use, in_place, tuple((tuple(served), variant) for variant, served in found.items()))


def document(
    entries: Iterable[Entry], kernels: Mapping[str, Mapping[str, Any]], architectures: Sequence[str], triton: str
) -> dict[str, Any]:
    """The content of `plans.json`, without its digest.

    Args:
        entries: in the order in which a loader looks for one that fits.
        kernels: by id: `name`, `parameters`, `dependent` and `files`.
        architectures: `sm_90` and so on.
        triton: version of the compiler.
    """
    ops = [_entry_document(entry) for entry in entries]
    return {"schema": SCHEMA, "triton": triton, "architectures": list(architectures), "kernels": dict(kernels), "ops": ops}


def text_of(data: Mapping[str, Any]) -> str:
    """The file's text; its digest is that of the text with zeros in its place."""
    text = json.dumps({**data, "digest": _BLANK}, sort_keys=True, indent=1) + "\n"
    return text.replace(_BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)


def _entry_document(entry: Entry) -> dict[str, Any]:
    declared, use = entry.declared, entry.use
    call, dtypes = call_of(declared, use, "", entry.in_place), dict(use.dtypes)

    def shape(name: str) -> list[Any]:
        return [as_json(of(size)) for size in shape_of(name, call.sizes)]

    inputs: list[dict[str, Any]] = [
        {"name": name, "shape": shape(name) if name in dtypes else [], "optional": name in declared.optional} for name in declared.inputs
    ]
    outputs: list[dict[str, Any]] = [
        {
            "name": output.name,
            "dtype": dtype_name(dtypes[output.like] if isinstance(output.like, str) else output.like),
            "shape": shape(output.name),
            "alias": output.alias if entry.in_place and output.alias in dtypes else None,
        }
        for output in declared.outputs
    ]
    names = {symbol for one in (*inputs, *outputs) for symbol in one["shape"] if isinstance(symbol, str)}
    return {
        "op": f"wm::{declared.op}",
        "key": {name: _plain(value) for name, value in use.plain},
        "dtypes": {name: dtype_name(dtype) for name, dtype in use.dtypes},
        "symbols": sorted(names),
        "inputs": inputs,
        "outputs": outputs,
        "absent": [name for name in declared.inputs if name not in dtypes],
        "onnx": {"op_type": op_type(declared.op), "attributes": _attributes(declared, use)},
        "variants": [_variant_document(architectures, variant) for architectures, variant in entry.variants],
    }


def op_type(op: str) -> str:
    """The name of an op's ONNX node: `WmSsdScan`."""
    return "Wm" + "".join(part.capitalize() for part in op.split("_"))


def _plain(value: Any) -> int | str:
    return repr(value) if isinstance(value, float) else value if isinstance(value, str) else int(value)


def _attributes(declared: Native, use: Use) -> dict[str, Any]:
    """Those of the node that select an entry; a plain argument whose attribute is "" selects none."""
    if callable(declared.attributes):
        named = dict(declared.attributes(dict(use.plain)))
    else:
        named = {declared.attributes.get(name, name): value for name, value in use.plain}
    return {name: {"float": repr(value)} if isinstance(value, float) else _plain(value) for name, value in named.items() if name}


def _variant_document(architectures: Sequence[str], variant: Variant) -> dict[str, Any]:
    return {
        "architectures": list(architectures),
        "when": [as_json(condition.predicate) for condition in variant.conditions],
        "scratch": [{"name": name, "bytes": as_json(size)} for name, size in variant.scratch],
        "launches": [
            {
                "kernel": launch.kernel.id,
                "grid": as_json(launch.grid),
                "arguments": [value if isinstance(value, str) else as_json(value[1]) for value in launch.arguments],
            }
            for launch in variant.launches
        ],
    }


@dataclass(frozen=True)
class PlannedLaunch:
    """A launch of one call: a kernel's id, its grid, and its arguments, names of tensors or integers."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[str | int, ...]


class Plans:
    """Plans that were read, and what calls come to by them; a loader's rules in Python, for tests."""

    def __init__(self, text: str) -> None:
        """Raises PlansError where the digest does not fit, or the schema is another."""
        data = json.loads(text)
        digest = data.get("digest", "")
        if hashlib.sha256(text.replace(digest, _BLANK, 1).encode()).hexdigest() != digest:
            raise PlansError(f"{FILE}: its digest is not that of its content; the file is damaged, export it again")
        if data["schema"] != SCHEMA:
            raise PlansError(f"{FILE}: schema {data['schema']}, expected {SCHEMA}; export it with this version")
        self.data: dict[str, Any] = data

    @staticmethod
    def read(folder: Path) -> "Plans":
        """The plans of a folder `kernels`."""
        return Plans((folder / FILE).read_text(encoding="utf-8"))

    def call(
        self, op: str, key: Mapping[str, Any], dtypes: Mapping[str, str], shapes: Mapping[str, Sequence[int]], arch: str, in_place: bool
    ) -> tuple[list[PlannedLaunch], dict[str, int]]:
        """The launches of a call and the bytes of each scratch.

        Args:
            op: `wm::ssd_scan`.
            key: plain arguments as the file writes them.
            dtypes: of the tensors that are given.
            shapes: of the same.
            arch: `sm_90`.
            in_place: whether the state is written where it was read.

        Raises:
            PlansError: nothing serves such a call.
        """
        for entry in self.data["ops"]:
            aliased = any(output["alias"] for output in entry["outputs"])
            if entry["op"] != op or entry["key"] != key or entry["dtypes"] != dtypes or aliased is not in_place:
                continue
            sizes = _bound(entry, shapes)
            if sizes is not None:
                return _served(entry, sizes, arch)
        raise PlansError(f"{op}: no plan for {dict(key)}, {dict(dtypes)}, shapes {dict(shapes)}; export the bundle of this model")


def _bound(entry: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """Sizes of symbols, or None where a shape does not fit."""
    sizes: dict[str, int] = {}
    for one in entry["inputs"]:
        if one["name"] in entry["absent"]:
            continue
        shape = shapes[one["name"]]
        if len(shape) != len(one["shape"]):
            return None
        for wanted, size in zip(one["shape"], shape, strict=True):
            expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            if expected != size:
                return None
    return sizes


def _served(entry: Mapping[str, Any], sizes: Mapping[str, int], arch: str) -> tuple[list[PlannedLaunch], dict[str, int]]:
    names = {one["name"] for one in (*entry["inputs"], *entry["outputs"])}
    for variant in entry["variants"]:
        if arch in variant["architectures"] and all(_holds(predicate, sizes) for predicate in variant["when"]):
            scratch = {one["name"]: evaluate(_tuples(one["bytes"]), sizes) for one in variant["scratch"]}
            tensors = names | set(scratch)
            launches = [
                PlannedLaunch(
                    launch["kernel"],
                    tuple(evaluate(_tuples(size), sizes) for size in launch["grid"]),
                    tuple(
                        value if isinstance(value, str) and value in tensors else evaluate(_tuples(value), sizes)
                        for value in launch["arguments"]
                    ),
                )
                for launch in variant["launches"]
            ]
            return launches, scratch
    raise PlansError(f"{entry['op']}: no variant for {dict(sizes)} on {arch}")


def _holds(predicate: Sequence[Any], sizes: Mapping[str, int]) -> bool:
    name, a, b = predicate[0], evaluate(_tuples(predicate[1]), sizes), evaluate(_tuples(predicate[2]), sizes)
    return bool({"<": a < b, "<=": a <= b, "==": a == b, "!=": a != b}[name])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


__all__ = ["FILE", "Entry", "NotServedError", "PlannedLaunch", "Plans", "PlansError", "document", "entries_of", "text_of"]
