"""Native plans: the Triton kernels that a model's graph uses, compiled ahead of time, and the data by which a loader launches them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import fx

from wm_export.native_compile import Compiled, compile_kernels
from wm_export.native_lint import check_kernel
from wm_export.program import Program
from wm_graph.errors import ExportError
from wm_kernels.cubin import registers_of
from wm_kernels.native import Kernel, Native, NotServedError, Use
from wm_kernels.native_ops import native_op
from wm_kernels.native_plans import FILE, Entry, document, entries_of, text_of
from wm_kernels.symbolic import TraceError
from wm_kernels.triton_support import SERVED

FOLDER = "kernels"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
NEEDED = "native export needs triton to compile kernels; install it with: pip install triton"


def check_architectures(capabilities: Sequence[int]) -> None:
    """Refuse a list of architectures that is empty, unknown or repeated, and a machine without a compiler.

    Raises:
        ExportError: one line says what is wrong.
    """
    if find_spec("triton") is None:
        raise ExportError(NEEDED)
    known = ", ".join(map(str, ARCHITECTURES))
    if not capabilities:
        raise ExportError(f"native export needs the architectures to compile for, such as --sm 80,90,100; known are {known}")
    for capability in capabilities:
        if capability not in ARCHITECTURES:
            raise ExportError(f"unknown architecture {capability}; choose from {known}")


def write_native(
    uses: Sequence[Use],
    capabilities: Sequence[int],
    folder: Path,
    tell: Callable[[float], None] | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Compile the kernels of ways in which ops are used into a new folder.

    Args:
        uses: of which graph ever.
        capabilities: 80 for sm_80, and so on.
        folder: the folder to make.
        tell: called with the fraction done.
        processes: how many compile at once; None is one for each processor.

    Returns:
        What a manifest says of the folder: architectures, the compiler's version, ops with plans and ops of the graph without.

    Raises:
        ExportError: a plan cannot be traced, or a kernel does not compile or cannot travel; the line names the op.
    """
    check_architectures(capabilities)
    architectures = [f"sm_{capability}" for capability in sorted(set(capabilities))]
    entries, without = _entries(uses, architectures)
    wanted = _kernels(entries)
    made = compile_kernels(list(wanted), processes, None if tell is None else lambda done: tell(done / len(wanted)))
    for compiled in made:
        declared = wanted[compiled.kernel, compiled.architecture]
        check_kernel(compiled, declared.rows, declared.op)
    kernels = _write_kernels(made, folder)
    (folder / FILE).write_text(text_of(document(entries, kernels, architectures, _triton_version())), encoding="utf-8")
    served = sorted({entry.use.op for entry in entries})
    return {"architectures": architectures, "triton": _triton_version(), "ops": served, "without": sorted(without)}


def uses_of(program: Program) -> list[Use]:
    """The ways in which a graph calls `wm` ops, each once, in the order of the graph.

    Raises:
        ExportError: an op's tensors disagree about a size.
    """
    found: dict[Use, None] = {}
    for node in program.exported.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("wm."):
            found[_use(node)] = None
    return list(found)


def _use(node: fx.Node) -> Use:
    op = str(node.target).split(".")[1]
    given = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    given |= node.kwargs
    plain: list[tuple[str, Any]] = []
    dtypes: list[tuple[str, torch.dtype]] = []
    sizes: dict[str, int | None] = {}
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        value = given.get(argument.name, argument.default_value)
        if "Tensor" not in str(argument.type):
            plain.append((argument.name, value))
        elif value is not None:
            tensor = value.meta["val"]
            dtypes.append((argument.name, tensor.dtype))
            for letter, size in _letters(op, argument.name, tensor.shape):
                if sizes.setdefault(letter, size) != size:
                    raise ExportError(f"wm::{op}: {argument.name} has size {size} along {letter}, other tensors {sizes[letter]}")
    return Use(op, tuple(plain), tuple(dtypes), tuple(sizes.items()))


def _letters(op: str, name: str, shape: Sequence[Any]) -> Iterator[tuple[str, int | None]]:
    letters = name.rsplit("_", 1)[1]
    if len(letters) != len(shape):
        raise ExportError(f"wm::{op}: {name} has {len(shape)} dimensions, its name says {len(letters)}")
    for letter, size in zip(letters, shape, strict=True):
        if not letter.isdigit():
            yield letter, size if isinstance(size, int) else None


def _entries(uses: Sequence[Use], architectures: Sequence[str]) -> tuple[list[Entry], set[str]]:
    """The entries of all uses, and the ops that have no kernel for a use."""
    entries: list[Entry] = []
    without = set()
    for use in uses:
        declared = native_op(use.op)
        floats = [dtype for _, dtype in use.dtypes if dtype.is_floating_point]
        if declared is None or not SERVED.issuperset(floats):
            without.add(use.op)
            continue
        try:
            entries += entries_of(declared, use, architectures)
        except NotServedError:
            without.add(use.op)
        except TraceError as error:
            raise ExportError(f"native plans: {error}") from error
    return entries, without


def _kernels(entries: Sequence[Entry]) -> dict[tuple[Kernel, str], Native]:
    """What is compiled, for which architecture, and the op that it is of."""
    return {
        (launch.kernel, architecture): entry.declared
        for entry in entries
        for architectures, variant in entry.variants
        for architecture in architectures
        for launch in variant.launches
    }


def _write_kernels(made: Sequence[Compiled], folder: Path) -> dict[str, dict[str, Any]]:
    kernels: dict[str, dict[str, Any]] = {}
    for compiled in made:
        identity = compiled.kernel.id
        file = folder / compiled.architecture / f"{identity}.cubin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(compiled.cubin)
        facts = {"name": compiled.name, "parameters": list(compiled.kernel.parameters), "dependent": compiled.kernel.dependent}
        entry = kernels.setdefault(identity, {**facts, "files": {}})
        entry["files"][compiled.architecture] = {
            "file": f"{compiled.architecture}/{identity}.cubin",
            "sha256": hashlib.sha256(compiled.cubin).hexdigest(),
            "size": len(compiled.cubin),
            "shared": compiled.shared,
            "warps": compiled.warps,
            "registers": registers_of(compiled.cubin),
        }
    return kernels


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")
