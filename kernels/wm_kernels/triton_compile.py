"""Compiling the launches of a plan ahead of time, on a machine with or without a GPU."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from wm_kernels.native import Kernel, unspecialized
from wm_kernels.triton_launch import INT32_MAX, Launch, Plan

_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
_DIVISIBLE = [["tt.divisibility", 16]]


def compile_plan(plan: Plan, dtypes: Mapping[str, torch.dtype], capability: int) -> list[Any]:
    """Compile every launch of a plan for one architecture.

    Args:
        plan: what to compile.
        dtypes: of the tensors that the plan names, scratch apart.
        capability: 80 for sm_80, 90 for sm_90, 100 for sm_100.

    Returns:
        Triton's compiled kernels, one per launch: `.asm["ptx"]`, `.metadata`. Pointers are taken to be aligned to 16 bytes, integers to be
        divisible by 16, or 1, where those of the plan are, but for `do_not_specialize` ones, which vary from call to call.
    """
    known = {**dtypes, **{name: wanted.dtype for name, wanted in plan.scratch.items()}}
    return [_compile(launch, known, capability) for launch in plan.launches]


def _compile(launch: Launch, dtypes: Mapping[str, torch.dtype], capability: int) -> Any:
    import triton

    kernel = launch.kernel if isinstance(launch.kernel, triton.JITFunction) else triton.JITFunction(launch.kernel.fn)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    constants = dict(launch.constants)
    runtime = [name for name in kernel.arg_names if name not in constants]
    varying = unspecialized(kernel)
    for name, value in zip(runtime, launch.arguments, strict=True):
        if value == 1 and name not in varying:
            constants[name] = 1
            continue
        if isinstance(value, str):
            signature[name] = _POINTERS[dtypes[value]]
        else:
            signature[name] = "i32" if -INT32_MAX <= value <= INT32_MAX else "i64"
        if isinstance(value, str) or (value % 16 == 0 and name not in varying):
            attributes[(kernel.arg_names.index(name),)] = _DIVISIBLE
    return _compiled(kernel, signature, attributes, constants, capability, launch.options)


def compile_kernel(kernel: Kernel, capability: int) -> Any:
    """Compile a kernel of traced plans for one architecture; the process must not have chosen Triton's interpreter.

    Args:
        kernel: what to compile.
        capability: 80 for sm_80, 90 for sm_90, 100 for sm_100.

    Returns:
        What Triton compiled: `.asm["cubin"]`, `.asm["ptx"]`, `.metadata`.
    """
    module, name = kernel.function
    function, constants = getattr(import_module(module), name), dict(kernel.constants)
    runtime = [name for name in function.arg_names if name not in constants]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for name, parameter in zip(runtime, kernel.parameters, strict=True):
        kind, *assumed = parameter.split(":")
        signature[name] = _POINTERS[getattr(torch, assumed[0])] if kind == "ptr" else kind
        if assumed and assumed[-1] == "16":
            attributes[(function.arg_names.index(name),)] = _DIVISIBLE
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "maxnreg": kernel.max_registers}
    return _compiled(function, signature, attributes, constants, capability, options)


def _compiled(
    function: Any,
    signature: Mapping[str, str],
    attributes: dict[tuple[int, ...], Any],
    constants: Mapping[str, Any],
    capability: int,
    options: Mapping[str, int | None],
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, {name: types[name] for name in function.arg_names}, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
