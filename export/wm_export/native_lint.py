"""What keeps a kernel from travelling: found in what was compiled, before it is written."""

import re
from collections.abc import Iterator, Mapping
from math import prod

import torch

from wm_export.native_compile import Compiled
from wm_graph.errors import ExportError
from wm_kernels.cubin import CubinError, architecture_of
from wm_kernels.native import DIVISOR, Kernel, Rows

SHARED = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}  # bytes
MOST_THREADS = 1024
WIDE = 16  # bytes that a thread reads at once
_WIDE_READS = re.compile(
    r"ld\.global(\.\w+(::\w+)*)*\.(v4\.[bfus]32|v2\.[bfus]64|b128)|cp\.async\.c[ag]\.shared\.global[^;]*, 0x10,|cp\.async\.bulk"
)
_TARGET = re.compile(r"^\.target\s+(sm_\d+)[af]?\b", re.MULTILINE)


def check_kernel(compiled: Compiled, rows: Mapping[str, Rows], op: str) -> None:
    """Refuse a kernel that cannot travel.

    Args:
        compiled: what was compiled.
        rows: of the op: which kernels move rows of 16 bytes a thread.
        op: for the message.

    Raises:
        ExportError: the line names the op, the kernel and what is wrong.
    """
    for fault in faults(compiled, rows):
        raise ExportError(f"wm::{op}: kernel {compiled.kernel.function[1]} for {compiled.architecture} {fault}")


def faults(compiled: Compiled, rows: Mapping[str, Rows]) -> Iterator[str]:
    """What is wrong with a kernel."""
    kernel, architecture = compiled.kernel, compiled.architecture
    for kind, size in compiled.hidden.items():
        if size:
            yield f"uses {size} bytes of hidden {kind} scratch, expected none: no loader brings them; do without descriptors and profilers"
    for parameter in kernel.parameters:
        if not parameter.startswith(("ptr:", "i32", "i64")):
            yield f"takes a parameter {parameter}, expected pointers and integers; make it a constant"
    limit = SHARED.get(int(architecture.removeprefix("sm_")), min(SHARED.values()))
    if compiled.shared > limit:
        yield f"needs {compiled.shared} bytes of shared memory, {limit} are there; choose smaller tiles or fewer stages"
    if compiled.warps * 32 > MOST_THREADS or compiled.cluster != 1:
        yield f"has {compiled.warps} warps in {compiled.cluster} programs at once, expected at most {MOST_THREADS // 32} in 1"
    if kernel.dependent and "griddepcontrol.wait" not in compiled.ptx:
        yield "starts before the kernel ahead of it has ended and does not wait for it; call wait_for_predecessor"
    yield from _wrong_target(compiled)
    if kernel.function[1] in rows and wide_reads_meant(kernel, rows[kernel.function[1]]) and not _WIDE_READS.search(compiled.ptx):
        yield f"reads less than {WIDE} bytes a thread; let strides be constants or divisible, and pointers aligned"


def _wrong_target(compiled: Compiled) -> Iterator[str]:
    target = _TARGET.search(compiled.ptx)
    if target is None or target.group(1) != compiled.architecture:
        yield f"was made for {target.group(1) if target else 'no target'}, expected {compiled.architecture}"
    try:
        found = architecture_of(compiled.cubin)
        if found != compiled.architecture:
            yield f"is a binary for {found}, expected {compiled.architecture}"
    except CubinError as error:
        yield f"is {error}, expected one for {compiled.architecture}"


def wide_reads_meant(kernel: Kernel, rows: Rows) -> bool:
    """Whether rows are whole pieces of 16 bytes, and seen to be by strides of 16 entries, and tiles large enough for all threads."""
    constants = dict(kernel.constants)
    sizes = [getattr(torch, parameter.split(":")[1]).itemsize for parameter in kernel.parameters if parameter.startswith("ptr:")]
    each = WIDE // min(size for size in sizes if size > 1) if sizes else WIDE
    return constants[rows.width] % max(each, DIVISOR) == 0 and prod(constants[name] for name in rows.tile) >= kernel.warps * 32 * each
