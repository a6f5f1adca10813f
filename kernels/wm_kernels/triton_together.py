"""Compiling the kernels of a call side by side, so that its first run waits for the slowest of them instead of for all."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from wm_kernels.triton_launch import Launch, Plan

_seen: set[tuple[object, ...]] = set()


def compile_together(plan: Plan, named: Mapping[str, Tensor | torch.dtype], device: torch.device) -> None:
    """Compile the launches of a plan, each in a thread; nothing on a device other than CUDA, or where at most one is new.

    Most of the compiler's work is done outside of Python's lock, or in other processes.

    Args:
        plan: what is about to be run.
        named: by their names in the plan, inputs, and dtypes of tensors that do not exist yet; scratch apart. These will be aligned.
        device: where it will run.
    """
    if device.type != "cuda":
        return
    known = {name: wanted.dtype for name, wanted in plan.scratch.items()} | dict(named)
    new = {_kind(launch, known): launch for launch in plan.launches if 0 not in launch.grid}
    new = {kind: launch for kind, launch in new.items() if kind not in _seen}
    _seen.update(new)
    if len(new) < 2:
        return

    def compiled(launch: Launch) -> None:
        with torch.cuda.device(device):  # a thread starts on the first one
            arguments = [known[value] if isinstance(value, str) else value for value in launch.arguments]
            launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **launch.options)._init_handles()

    with ThreadPoolExecutor(len(new)) as threads:
        list(threads.map(compiled, new.values()))


def _kind(launch: Launch, known: Mapping[str, Tensor | torch.dtype]) -> tuple[object, ...]:
    """What a kernel is compiled anew for, but for how integers divide."""
    given = [known[value] for value in launch.arguments if isinstance(value, str)]
    dtypes = [value.dtype if isinstance(value, Tensor) else value for value in given]
    return id(launch.kernel), *dtypes, *launch.ordered_constants, *launch.options.values()
