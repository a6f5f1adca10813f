"""Launches of Triton kernels as plain data: eager calls, the interpreter and ahead-of-time compilation share one plan per op.

An op's `plan.py` says which kernels run on which grids with which arguments; it sees sizes, strides and dtypes, never tensors. Tensors are
named in a plan, so that one that is computed for a call can as well be compiled for a GPU that is not here, or written down as data.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: a `triton.jit` function. Its parameters are pointers and integers, then constants.
        grid: programs along each axis; one that is 0 launches nothing.
        arguments: in the kernel's order, the name of a tensor or an integer.
        constants: `tl.constexpr` parameters by name.
        num_warps: warps of a program.
        num_stages: depth of software pipelines.
        max_registers: of a thread, so that more programs fit a multiprocessor; None leaves it to the compiler.
        compiled: what Triton made of it, by device and by what it tells tensors apart by; filled as calls are made.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[str | int, ...]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def options(self) -> dict[str, int | None]:
        """What Triton's compiler is told beside the constants."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}

    @cached_property
    def blocks(self) -> tuple[int, int, int]:
        """The grid with all of its three axes."""
        x, y, z = (*self.grid, 1, 1)[:3]
        return x, y, z

    @cached_property
    def ordered_constants(self) -> tuple[Any, ...]:
        """The constants as the kernel orders its parameters."""
        return tuple(self.constants[name] for name in self.kernel.arg_names if name in self.constants)


@dataclass(frozen=True)
class Scratch:
    """Memory that lives as long as one call: contiguous, with or without zeros in it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    zeroed: bool = False


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and the scratch that they share."""

    launches: tuple[Launch, ...]
    scratch: Mapping[str, Scratch] = field(default_factory=lambda: MappingProxyType({}))


def run(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Launch a plan on the device of its tensors.

    Args:
        plan: what to launch.
        tensors: inputs and outputs by their names in the plan; at least one. Optional ones that are absent are not named in it.
    """
    device = next(iter(tensors.values())).device
    named = dict(tensors)
    for name, wanted in plan.scratch.items():
        make = torch.zeros if wanted.zeroed else torch.empty
        named[name] = make(wanted.shape, dtype=wanted.dtype, device=device)
    if device.type != "cuda":
        for launch in plan.launches:
            _launch(launch, named)
    elif device.index == torch.cuda.current_device():
        _run_on_cuda(plan, named, device.index)
    else:
        with torch.cuda.device(device):
            _run_on_cuda(plan, named, device.index)


def _launch(launch: Launch, named: Mapping[str, Tensor]) -> Any:
    if 0 in launch.grid:
        return None
    arguments = [named[value] if isinstance(value, str) else value for value in launch.arguments]
    return launch.kernel[launch.grid](*arguments, **launch.constants, **launch.options)


def _run_on_cuda(plan: Plan, named: Mapping[str, Tensor], device: int) -> None:
    """Launch what Triton compiled before, where it would take the same: its own look at every argument costs more than a short kernel."""
    for launch in plan.launches:
        tensors = [named[value] for value in launch.arguments if isinstance(value, str)]
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (device, *[tensor.dtype for tensor in tensors], *[pointer % 16 == 0 for pointer in pointers])
        compiled = launch.compiled.get(key)
        if compiled is None:
            compile_together(plan, named, device)
            compiled = _launch(launch, named)
            if compiled is not None:
                launch.compiled[key] = compiled
            continue
        given = iter(pointers)
        arguments = [next(given) if isinstance(value, str) else value for value in launch.arguments]
        compiled[launch.blocks](*arguments, *launch.ordered_constants)


_met: set[tuple[Any, ...]] = set()


def compile_together(plan: Plan, named: Mapping[str, Tensor], device: int) -> None:
    """Compile the launches whose like this device has not had, in a thread each: a first call waits for the slowest, not for all in turn.

    What is compiled is found again by the launch. Threads do: passes, ptxas and the C compiler all run without the interpreter's lock.
    """
    dtypes = {name: tensor.dtype for name, tensor in named.items()}
    new = {_kind(launch, dtypes, device): launch for launch in plan.launches if 0 not in launch.grid}
    new = {kind: launch for kind, launch in new.items() if kind not in _met}
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as threads:
            for done in [threads.submit(_compile, launch, dtypes, device) for launch in new.values()]:
                done.result()
    _met.update(new)


def _kind(launch: Launch, dtypes: Mapping[str, torch.dtype], device: int) -> tuple[Any, ...]:
    pointers = (dtypes[value] for value in launch.arguments if isinstance(value, str))
    return (device, launch.kernel, *launch.constants.items(), *launch.options.values(), *pointers)


def _compile(launch: Launch, dtypes: Mapping[str, torch.dtype], device: int) -> None:
    with torch.cuda.device(device):  # a thread starts on the first one
        arguments = [dtypes[value] if isinstance(value, str) else value for value in launch.arguments]
        made = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **launch.options)
        _ = made.run  # builds what calls the kernel, and loads it


@cache
def architecture(device: torch.device) -> str:
    """What configurations are looked up by: `sm_90` of a CUDA device, `interpreter` of any other."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides in elements, those of axes of size 1 as 0: no kernel is compiled again because of them."""
    return strides_of(tensor.shape, tensor.stride())


def strides_of(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """`strides` of a tensor of this shape and these strides."""
    return tuple(0 if size == 1 else step for size, step in zip(shape, stride, strict=True))
