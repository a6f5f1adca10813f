"""Launches of Triton kernels as plain data: eager calls, the interpreter and ahead-of-time compilation share one plan per op.

An op's `plan.py` says which kernels run on which grids with which arguments; it sees sizes, strides and dtypes, never tensors. Tensors are
named in a plan, so that one that is computed for a call can as well be compiled for a GPU that is not here, or written down as data.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from math import prod
from operator import itemgetter
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from wm_kernels import triton_configs
from wm_kernels.numerics import exact
from wm_kernels.triton_support import inner_contiguous

INT32_MAX = 2**31 - 1
ALIGNMENT = 16  # of a pointer, in bytes: Triton compiles those that have it apart from those that do not
ALIGNED = 256  # bytes of which every piece of scratch is a multiple


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
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[str | int, ...]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

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
    """Memory that lives as long as one call: contiguous, with anything in it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def bytes(self) -> int:
        """Its length."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and the scratch that they share.

    Attributes:
        launches: what is run.
        scratch: by name.
        ready: what Triton compiled, as it is launched again, by device and by what Triton tells tensors apart by; filled as calls are made.
    """

    launches: tuple[Launch, ...]
    scratch: Mapping[str, Scratch] = field(default_factory=lambda: MappingProxyType({}))
    ready: dict[tuple[Any, ...], "_Ready"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def places(self) -> tuple[tuple[int, ...], int]:
        """Where each scratch lies in one piece of memory, in bytes, and how long that is: an allocation costs as much as a launch."""
        ends = tuple(accumulate((-(-wanted.bytes // ALIGNED) * ALIGNED for wanted in self.scratch.values()), initial=0))
        return ends[:-1], ends[-1]


@dataclass(frozen=True)
class _Ready:
    """How compiled launches are called with nothing but pointers.

    Attributes:
        launches: of each launch what Triton compiled, its blocks, and what picks its arguments from pointers and values.
        values: integers and constants of all launches, which follow the pointers.
    """

    launches: tuple[tuple[Any, tuple[int, int, int], Callable[[Sequence[Any]], tuple[Any, ...]]], ...]
    values: tuple[Any, ...]


def run(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Launch a plan on the device of its tensors.

    Args:
        plan: what to launch.
        tensors: inputs and outputs by their names in the plan; at least one. Optional ones that are absent are not named in it.
    """
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        named = {**tensors, **_scratch(plan, device)}
        for launch in plan.launches:
            _launch(launch, named)
    elif device.index == torch.cuda.current_device():
        _run_on_cuda(plan, tensors, device)
    else:
        with torch.cuda.device(device):
            _run_on_cuda(plan, tensors, device)


def _scratch(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(wanted.shape, dtype=wanted.dtype, device=device) for name, wanted in plan.scratch.items()}


def _launch(launch: Launch, named: Mapping[str, Tensor]) -> Any:
    if 0 in launch.grid:
        return None
    arguments = [named[value] if isinstance(value, str) else value for value in launch.arguments]
    return launch.kernel[launch.grid](*arguments, **launch.constants, **launch.options)


def _run_on_cuda(plan: Plan, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Launch what Triton compiled before, where it would take the same: its own look at every argument costs more than a short kernel."""
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    key: tuple[Any, ...] = (device.index, *tensors, *[tensor.dtype for tensor in tensors.values()])
    if any([pointer % ALIGNMENT for pointer in pointers]):
        key += tuple(pointer % ALIGNMENT == 0 for pointer in pointers)
    ready = plan.ready.get(key)
    if ready is None:
        plan.ready[key] = _first_run(plan, {**tensors, **_scratch(plan, device)}, device.index)
        return
    if plan.scratch:
        places, length = plan.places
        memory = torch.empty(length, dtype=torch.uint8, device=device)
        start = memory.data_ptr()
        pointers += [start + place for place in places]
    given, stream, hooked = (*pointers, *ready.values), _stream(device.index), _hooked()
    for compiled, blocks, pick in ready.launches:
        if hooked:
            compiled[blocks](*pick(given))
        else:
            compiled.run(*blocks, stream, compiled.function, compiled.packed_metadata, None, None, None, *pick(given))


def _first_run(plan: Plan, named: Mapping[str, Tensor], device: int) -> _Ready:
    compile_together(plan, named, device)
    places = {name: place for place, name in enumerate(named)}
    values: list[Any] = []

    def place(value: Any) -> int:
        values.append(value)
        return len(named) + len(values) - 1

    launches = []
    for launch in plan.launches:
        compiled = _launch(launch, named)
        if compiled is not None:
            indices = [places[value] if isinstance(value, str) else place(value) for value in launch.arguments]
            indices += [place(value) for value in launch.ordered_constants]
            launches.append((compiled, launch.blocks, itemgetter(*indices)))
    return _Ready(tuple(launches), tuple(values))


def _stream(device: int) -> int:
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


@cache
def _knobs() -> Any:
    from triton import knobs

    return knobs.runtime


def _hooked() -> bool:
    """Whether a profiler wants to know of launches, as Triton's Proton does."""
    knobs = _knobs()
    return bool(knobs.launch_enter_hook.calls or knobs.launch_exit_hook.calls)


_met: set[tuple[Any, ...]] = set()


def compile_together(plan: Plan, named: Mapping[str, Tensor], device: int) -> None:
    """Compile the launches whose like this device has not had, in a thread each: a first call waits for the slowest, not for all in turn.

    What is compiled is found again by the launch. Threads do: passes, ptxas and the C compiler all run without the interpreter's lock.
    """
    dtypes = {name: tensor.dtype for name, tensor in named.items()}
    new = {_kind(launch, dtypes, device): launch for launch in plan.launches if 0 not in launch.grid}
    new = {kind: launch for kind, launch in new.items() if kind not in _met}
    if new:
        _start_compiler()
        # The last launch of an op is seldom its smallest: it comes first.
        with ThreadPoolExecutor(len(new)) as threads:
            for done in [threads.submit(_compile, launch, dtypes, device) for launch in reversed(new.values())]:
                done.result()
    _met.update(new)


def _kind(launch: Launch, dtypes: Mapping[str, torch.dtype], device: int) -> tuple[Any, ...]:
    pointers = (dtypes[value] for value in launch.arguments if isinstance(value, str))
    return (device, launch.kernel, *launch.constants.items(), *launch.options.values(), *pointers)


@cache
def _start_compiler() -> None:
    """What Triton does once before it compiles: it hashes its own 400 MB, and builds its driver; here at the same time."""
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    with ThreadPoolExecutor(1) as thread:
        hashed = thread.submit(triton_key)
        _ = driver.active.utils
        hashed.result()


def _compile(launch: Launch, dtypes: Mapping[str, torch.dtype], device: int) -> None:
    arguments = [dtypes[value] if isinstance(value, str) else value for value in launch.arguments]
    with torch.cuda.device(device):  # a thread starts on the first one
        _ = launch.kernel.device_caches[device]  # not made twice
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_build_caller, launch, arguments, device)
            made = launch.kernel.warmup(*arguments, grid=launch.grid, **launch.constants, **launch.options)
        _ = made.run  # loads it, and what calls it


def _build_caller(launch: Launch, arguments: Sequence[Any], device: int) -> None:
    """Have the C compiler build what calls a kernel while that is compiled; Triton would wait for one, then for the other.

    It is found in Triton's cache afterwards. Should another version of Triton refuse, nobody asks: Triton then builds it itself.
    """
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    kernel, options = launch.kernel, {**launch.options, "debug": False, "instrumentation_mode": ""}
    with torch.cuda.device(device):
        backend, binder = kernel.device_caches[device][3:]
        bound, specialization, given = binder(*map(MockTensor.wrap_dtype, arguments), **launch.constants, **options)
        _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, given)
        source = ASTSource(kernel, signature, constants, attributes)
        unknown = dict.fromkeys(("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"), 0)
        driver.active.launcher_cls(source, SimpleNamespace(**unknown, launch_cooperative_grid=False, launch_pdl=False))


KNOWN = 1024  # calls that an op remembers


@dataclass(frozen=True)
class Known:
    """What a call of certain shapes, strides and dtypes comes to.

    Attributes:
        plan: its launches.
        copied: names of tensors that are made contiguous first.
    """

    plan: Plan
    copied: tuple[str, ...] = ()


def call_key(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What decides an op's launches beside its plain arguments: dtypes, shapes and strides of its tensors, numerics, the table in use."""
    # The tuner puts other tables in the place of the package's.
    layouts = [None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in tensors]
    return triton_configs._rows, exact(), *layouts


def not_in_rows(name: str, tensor: Tensor) -> bool:
    """Whether a tensor's last axis is not contiguous, whatever its name."""
    return inner_contiguous(tensor) is not tensor


def known_plan(
    known: dict[tuple[Any, ...], Known],
    key: tuple[Any, ...],
    given: dict[str, Tensor],
    make: Callable[[Mapping[str, Tensor]], Plan],
    check: Callable[[], None] | None = None,
    copied: Callable[[str, Tensor], bool] = not_in_rows,
) -> Plan:
    """The plan of a call; to look at every argument anew costs more than a step's launch.

    Args:
        known: what the op remembers.
        key: what decides the plan: `call_key` and the plain arguments.
        given: tensors by their names in the plan; those that a kernel cannot read where they are become contiguous copies.
        make: the plan, from tensors as they are launched with.
        check: raises where arguments are wrong; called unless a call of the same key has passed it.
        copied: whether a kernel cannot read the tensor of this name where it is.
    """
    found = known.get(key)
    if found is None:
        if check is not None:
            check()
        names = tuple(name for name, tensor in given.items() if copied(name, tensor))
        ready = {name: tensor.contiguous() if name in names else tensor for name, tensor in given.items()}
        found = remember(known, key, Known(make(ready), names))
    for name in found.copied:
        given[name] = given[name].contiguous()
    return found.plan


def remember(known: dict[tuple[Any, ...], Known], key: tuple[Any, ...], made: Known) -> Known:
    """Keep what a call comes to."""
    if len(known) >= KNOWN:
        known.clear()
    known[key] = made
    return made


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
