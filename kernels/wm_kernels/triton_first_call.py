"""Compiling the kernels of a plan at the same time: the first call waits for the slowest of them instead of all in turn."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from wm_kernels.triton_launch import Launch, Plan

_met: set[tuple[Any, ...]] = set()


def compile_together(plan: Plan, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Compile the launches whose like no plan on this device has had, in a thread each; what is compiled is found again by `run`.

    Args:
        plan: of a call about to be made.
        dtypes: of the tensors that the plan names, scratch apart.
        device: where it will run; one that is no CUDA device is left to the interpreter.
    """
    if device.type != "cuda":
        return
    known = {**dtypes, **{name: wanted.dtype for name, wanted in plan.scratch.items()}}
    new: dict[tuple[Any, ...], Launch] = {_kind(launch, known, device): launch for launch in plan.launches if 0 not in launch.grid}
    new = {kind: launch for kind, launch in new.items() if kind not in _met}
    if len(new) > 1:
        # Threads do: passes, ptxas and the C compiler all run without the interpreter's lock.
        with ThreadPoolExecutor(len(new)) as threads:
            for done in [threads.submit(_compile, launch, known, device) for launch in new.values()]:
                done.result()
    _met.update(new)


def _kind(launch: Launch, dtypes: Mapping[str, torch.dtype], device: torch.device) -> tuple[Any, ...]:
    pointers = (dtypes[value] for value in launch.arguments if isinstance(value, str))
    return (device, launch.kernel, *launch.constants.items(), *launch.options.values(), *pointers)


def _compile(launch: Launch, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    with torch.cuda.device(device):
        arguments = [dtypes[value] if isinstance(value, str) else value for value in launch.arguments]
        made = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **launch.options)
        _ = made.run  # builds what calls the kernel, and loads it
