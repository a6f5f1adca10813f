"""Plans as data: an op's launches for all sizes at once, which a loader without Python makes.

Each op that travels has a `native.py`, which declares how its tensors and plain arguments make the call of its plan. Letters in the names
of tensors are their sizes, as everywhere. A plan is run with sizes that are not known (`symbolic`); what comes out are variants: launches,
whose grids and arguments are expressions, and the conditions under which they are the op's.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from wm_kernels.conditions import Condition
from wm_kernels.expressions import Expression, bounds, evaluate, factor
from wm_kernels.symbolic import TraceError, explore, known, of, symbol
from wm_kernels.triton_launch import ALIGNMENT, INT32_MAX, Launch, Plan
from wm_kernels.triton_support import dtype_name

DIVISOR = 16  # of integers: what Triton compiles apart
AXES = 3  # of a grid
NEAR = 2**32  # an integer that stays below it where a single symbol is large is 32 bits wide; the loader refuses the rest
Plain = int | float | str | bool


class NotServedError(Exception):
    """A call of an op that no kernel serves; one line says which."""


@dataclass(frozen=True)
class Output:
    """An output of an op.

    Attributes:
        name: ends in the letters of its shape.
        like: the input whose dtype it has, or a dtype.
        alias: the input that it may take the place of: the launches then read and write that.
    """

    name: str
    like: str | torch.dtype
    alias: str | None = None


@dataclass(frozen=True)
class Call:
    """What an op's plan is made from.

    Attributes:
        sizes: by letter, known or symbols.
        dtypes: of the tensors that are given, by name.
        plain: the other arguments, by name.
        arch: as configurations name it, `sm_90`.
        in_place: whether the outputs that may do so take the place of inputs.
    """

    sizes: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    plain: Mapping[str, Any]
    arch: str
    in_place: bool = False

    def dims(self, letters: str) -> tuple[int, ...]:
        """Sizes by letter."""
        return tuple(self.sizes[letter] for letter in letters)

    def given(self, name: str) -> bool:
        """Whether an input is there."""
        return name in self.dtypes

    def strides(self, name: str, axes: int | None = None) -> tuple[int, ...]:
        """Strides, in elements, of a contiguous tensor; of its first axes."""
        shape = shape_of(name, self.sizes)
        return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))[:axes]


@dataclass(frozen=True)
class Rows:
    """What a kernel that moves rows of 16 bytes a thread reads at once, by names of its constants.

    Attributes:
        width: of a row.
        tile: constants whose product is the number of elements.
    """

    width: str
    tile: tuple[str, ...]


@dataclass(frozen=True)
class Native:
    """How an op becomes launches.

    Attributes:
        op: name without `wm::`.
        plan: the launches of a call.
        outputs: in order.
        names: the plan's name of a tensor -> the op's; of several the first that is there, for stand-ins. Others are the op's own.
        attributes: plain argument -> attribute of the ONNX node; those that are not named have their own name. Or a function from plain
            arguments to all attributes that the node has.
        sizes: letters that kernels must know though graphs do not, from the plain arguments, and those of outputs alone.
        apart: whether kernels can also leave the state that they are given as it is and write the new one elsewhere.
        rows: kernels that move rows, by name.
    """

    op: str
    plan: Callable[[Call], Plan]
    outputs: tuple[Output, ...]
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    attributes: Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda plain: {}
    apart: bool = False
    rows: Mapping[str, Rows] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def schema(self) -> Any:
        """Of the op without `_`."""
        return getattr(torch.ops.wm, self.op).default._schema

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all tensors that it takes, in order."""
        return tuple(argument.name for argument in self.schema.arguments if "Tensor" in str(argument.type))

    @property
    def optional(self) -> frozenset[str]:
        """Names of the tensors that calls may leave out."""
        return frozenset(argument.name for argument in self.schema.arguments if str(argument.type) == "Optional[Tensor]")

    @property
    def plain(self) -> tuple[str, ...]:
        """Names of its other arguments, in order."""
        return tuple(argument.name for argument in self.schema.arguments if "Tensor" not in str(argument.type))

    def name(self, tensor: str, call: Call) -> str:
        """The op's name of one of the plan's tensors that is no scratch."""
        found = self.names.get(tensor, tensor)
        there = {*call.dtypes, *(output.name for output in self.outputs)}
        for one in (found,) if isinstance(found, str) else found:
            if one in there:
                return one
        raise TraceError(f"its plan names {tensor!r}, expected one of {', '.join(sorted(there))}; name it in its native.py")


@dataclass(frozen=True)
class Use:
    """A way in which a graph calls an op.

    Attributes:
        op: name without `wm::`.
        plain: arguments that are no tensors, by name.
        dtypes: of the tensors that are given, by name.
        sizes: by letter; None where calls differ.
    """

    op: str
    plain: tuple[tuple[str, Plain], ...]
    dtypes: tuple[tuple[str, torch.dtype], ...]
    sizes: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Kernel:
    """What is compiled: a function, its parameters' types and its constants.

    Attributes:
        function: module and name of a `triton.jit` function.
        parameters: `ptr:<dtype>:<alignment>`, `i32`, `i64`, the latter two with `:<divisor>` where it is assumed.
        constants: (name, value) in the order of names.
        warps: of a program.
        stages: depth of software pipelines.
        max_registers: of a thread, or None.
    """

    function: tuple[str, str]
    parameters: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    max_registers: int | None

    @property
    def dependent(self) -> bool:
        """Whether it waits itself for the kernel ahead of it in the stream, and so may start before that ends."""
        return bool(dict(self.constants).get("DEPENDENT"))

    @property
    def id(self) -> str:
        """The function's name and a hash of what is compiled, the architecture apart."""
        parts = (_source(self.function[0]), self.function, self.parameters, self.constants, self.warps, self.stages, self.max_registers)
        return f"{self.function[1].lower()}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class NativeLaunch:
    """A launch with expressions; arguments are names of tensors, or `("int", expression)`."""

    kernel: Kernel
    grid: tuple[Expression, Expression, Expression]
    arguments: tuple[str | tuple[str, Expression], ...]


@dataclass(frozen=True)
class Variant:
    """The launches of calls whose sizes meet all conditions, and the length of each scratch in bytes by its name."""

    conditions: tuple[Condition, ...]
    launches: tuple[NativeLaunch, ...]
    scratch: tuple[tuple[str, Expression], ...]

    def serves(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is the one for these sizes."""
        return all(condition.holds(sizes) for condition in self.conditions)


def uncached(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """A plan function behind its cache, which cannot tell symbols apart."""
    return inspect.unwrap(plan)


def shape_of(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that a tensor's name tells: `x_BTHP`."""
    return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in name.rsplit("_", 1)[1])


def call_of(declared: Native, use: Use, arch: str, in_place: bool) -> Call:
    """The call of a plan, with symbols for sizes that are not known."""
    plain = dict(use.plain)
    found = {letter: symbol(letter) if size is None else size for letter, size in use.sizes}
    return Call(found | dict(declared.sizes(plain)), dict(use.dtypes), plain, arch, in_place)


def trace(declared: Native, use: Use, arch: str, in_place: bool) -> tuple[Variant, ...]:
    """The variants of an op for one architecture.

    Raises:
        NotServedError: no kernel serves this use.
        TraceError: the plan branches too often, or on what is not known; the line names the op.
    """

    def run() -> tuple[tuple[NativeLaunch, ...], tuple[tuple[str, Expression], ...]]:
        call = call_of(declared, use, arch, in_place)
        plan = declared.plan(call)
        dtypes = _dtypes(declared, call) | {name: wanted.dtype for name, wanted in plan.scratch.items()}
        launches = tuple(_native_launch(declared, call, launch, frozenset(plan.scratch), dtypes) for launch in plan.launches)
        return launches, tuple((name, of(wanted.bytes)) for name, wanted in plan.scratch.items())

    try:
        return tuple(Variant(found.conditions, *found.result) for found in explore(run))
    except TraceError as error:
        raise TraceError(f"wm::{declared.op}: {error}") from error


def _dtypes(declared: Native, call: Call) -> dict[str, torch.dtype]:
    likes = {output.name: call.dtypes[output.like] if isinstance(output.like, str) else output.like for output in declared.outputs}
    return {**call.dtypes, **likes}


def _native_launch(
    declared: Native, call: Call, launch: Launch, scratch: frozenset[str], dtypes: Mapping[str, torch.dtype]
) -> NativeLaunch:
    function = launch.kernel.fn
    constants = {name: known(value, f"constant {name} of {function.__name__}") for name, value in launch.constants.items()}
    options = [known(value, f"an option of {function.__name__}") for value in (launch.num_warps, launch.num_stages, launch.max_registers)]
    runtime = [name for name in launch.kernel.arg_names if name not in constants]
    varying = unspecialized(launch.kernel)
    arguments: list[str | tuple[str, Expression]] = []
    parameters: list[str] = []
    for name, value in zip(runtime, launch.arguments, strict=True):
        if isinstance(value, str):
            tensor = value if value in scratch else declared.name(value, call)
            arguments.append(tensor)
            parameters.append(f"ptr:{dtype_name(dtypes[tensor])}:{ALIGNMENT}")
        elif of(value) == 1 and name not in varying:
            constants[name] = 1  # as Triton's launcher has it: loads of such a stride are wide, and sums have the order that follows
        else:
            arguments.append(("int", of(value)))
            parameters.append(_integer(of(value), name not in varying))
    x, y, z = (*map(of, launch.grid), 1, 1)[:AXES]
    kernel = Kernel((function.__module__, function.__name__), tuple(parameters), tuple(sorted(constants.items())), *options)
    return NativeLaunch(kernel, (x, y, z), tuple(arguments))


def unspecialized(kernel: Any) -> set[str]:
    """Parameters whose values Triton does not look at when it compiles."""
    if hasattr(kernel, "params"):
        return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return set(kernel.kwargs.get("do_not_specialize") or ())  # the interpreter's


def _integer(value: Expression, specialized: bool) -> str:
    """The type of an integer parameter: as wide as its values are where one symbol is large and the others are 1."""
    names = sorted(_symbols(value))
    far = [evaluate(value, {name: INT32_MAX if name == large else 1 for name in names}) for large in names] if names else [of_number(value)]
    kind = "i32" if max(map(abs, far)) < (NEAR if names else INT32_MAX + 1) else "i64"
    return f"{kind}:{DIVISOR}" if specialized and factor(value) % DIVISOR == 0 else kind


def of_number(value: Expression) -> int:
    """The value of an expression without symbols."""
    return bounds(value)[0]


def _symbols(value: Expression) -> set[str]:
    if isinstance(value, str):
        return {value}
    return {name for part in value[1:] for name in _symbols(part)} if isinstance(value, tuple) else set()


@cache
def _source(module: str) -> str:
    """A hash of the text of a module and of the modules of this package whose functions it uses."""
    texts, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = inspect.getsource(sys.modules[name])
            used = {getattr(value, "__module__", None) for value in vars(sys.modules[name]).values()}
            waiting += [one for one in used if one and one.startswith("wm_kernels.")]
    return hashlib.sha256("".join(texts[name] for name in sorted(texts)).encode()).hexdigest()
