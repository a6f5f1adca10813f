"""Kernels of traced plans compiled for GPUs that need not be here, in processes side by side."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

from wm_graph.errors import ExportError
from wm_kernels.native import Kernel

# Line tables would carry the paths of this machine.
_SETTINGS = {"TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "1"}
_NOT_THEIRS = ("TRITON_INTERPRET", "TRITON_KERNEL_DUMP", "TRITON_KERNEL_OVERRIDE", "TRITON_DEBUG", "TRITON_OVERRIDE_ARCH")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        kernel: what was compiled.
        architecture: `sm_90`.
        name: of the function in the binary.
        cubin: the binary.
        ptx: the text that it was made from.
        shared: bytes of shared memory of a program.
        warps: of a program.
        hidden: bytes of memory that launches must bring beside the parameters, by kind.
        cluster: programs that a launch groups; 1 is none.
    """

    kernel: Kernel
    architecture: str
    name: str
    cubin: bytes
    ptx: str
    shared: int
    warps: int
    hidden: Mapping[str, int]
    cluster: int


def compile_kernels(
    kernels: Sequence[tuple[Kernel, str]], processes: int | None = None, tell: Callable[[int], None] | None = None
) -> list[Compiled]:
    """Compile kernels, each for the architecture beside it; Triton's cache serves what it has had before.

    Args:
        kernels: what to compile, and for which `sm_90`.
        processes: how many work at once; None is one for each processor.
        tell: called with the number of kernels done.

    Raises:
        ExportError: a kernel does not compile; the line names it.
    """
    count = max(1, min(len(kernels), processes or len(os.sched_getaffinity(0))))
    idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    done: list[None] = []

    def work(one: tuple[Kernel, str]) -> Compiled:
        worker = idle.get()
        try:
            return _asked(worker, *one)
        finally:
            idle.put(worker)
            done.append(None)
            if tell is not None:
                tell(len(done))

    with ExitStack() as stack:
        for _ in range(count):
            worker = subprocess.Popen(
                [sys.executable, "-m", "wm_kernels.compile_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_environment(),
            )  # fmt: skip
            stack.callback(_end, worker)
            idle.put(worker)
        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(work, kernels))


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_THEIRS}
    return kept | _SETTINGS | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _asked(worker: "subprocess.Popen[str]", kernel: Kernel, architecture: str) -> Compiled:
    assert worker.stdin is not None
    assert worker.stdout is not None
    wanted = asdict(kernel) | {"capability": int(architecture.removeprefix("sm_"))}
    try:
        worker.stdin.write(json.dumps(wanted) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise ExportError(f"kernel {kernel.function[1]} for {architecture}: the compiling process ended; is there enough memory?")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ExportError(f"kernel {kernel.function[1]} for {architecture} does not compile: {answer['error']}")
    cubin = base64.b64decode(answer["cubin"])
    sizes = answer["shared"], answer["warps"], answer["scratch"], answer["blocks_of_cluster"]
    return Compiled(kernel, architecture, answer["name"], cubin, answer["ptx"], *sizes)


def _end(worker: "subprocess.Popen[str]") -> None:
    worker.kill()
    worker.communicate()
