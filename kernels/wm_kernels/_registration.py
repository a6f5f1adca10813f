"""What every op definition shares: the accumulation dtype, shape checks, and autograd through the reference."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_that(op: str, holds: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise RuntimeError with one line naming the op unless `holds`; symbolic conditions become runtime assertions."""
    # torch._check costs a microsecond even when all is well, and a decode step makes hundreds of checks.
    if holds is not True:
        torch._check(holds, lambda: f"wm::{op}: {message()}")


def check_shapes(op: str, **named: Tensor | None) -> dict[str, int]:
    """Check that shapes agree, reading the dimension letters from each argument's suffix, and return the size of each letter.

    `check_shapes("rope", x_BTHP=x, cos_BTF=cos)` binds B, T, H and P to the shape of x, then expects cos to share B and T.
    A digit is a literal size. Arguments that are None are skipped.

    Raises:
        RuntimeError: a number of dimensions or a size differs; the message names the op, the shape and what was expected.
    """
    sizes: dict[str, int] = {}
    for name, tensor in named.items():
        if tensor is None:
            continue
        letters = name.rsplit("_", 1)[1]
        shape = tensor.shape
        check_that(op, len(shape) == len(letters), _shape_message(name, shape, letters, sizes))
        for letter, size in zip(letters, shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            check_that(op, size == expected, _shape_message(name, shape, letters, sizes))
    return sizes


def _shape_message(name: str, shape: Sequence[int], letters: str, sizes: dict[str, int]) -> Callable[[], str]:
    def message() -> str:
        expected = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
        return f"{name} has shape ({', '.join(map(str, shape))}), expected ({expected})"

    return message


def check_dtype(op: str, expected: torch.dtype, **named: Tensor | None) -> None:
    """Raise RuntimeError unless every given tensor has the dtype `expected`."""
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != expected:
            dtype = tensor.dtype
            check_that(op, False, lambda name=name, dtype=dtype: f"{name} is {dtype}, expected {expected}")  # type: ignore[misc]


def check_together(op: str, **named: Tensor | None) -> None:
    """Raise RuntimeError unless all of the tensors are given or none is."""
    given = [name for name, tensor in named.items() if tensor is not None]
    if given and len(given) != len(named):
        check_that(op, False, lambda: f"got {', '.join(given)} alone, expected all or none of {', '.join(named)}")


def spans(total: int, elements_each: int, elements_at_once: int) -> list[tuple[int, int]]:
    """Cut 0 .. total into (start, end) spans, each holding at most `elements_at_once` where every item makes `elements_each`.

    Symbolic sizes, as in a backward pass traced by torch.compile, give a single span: a loop over them would fix the size.
    """
    if isinstance(total, torch.SymInt) or isinstance(elements_each, torch.SymInt):
        return [(0, total)]
    step = max(1, elements_at_once // max(1, elements_each))
    return [(start, min(total, start + step)) for start in range(0, max(total, 1), step)]


def register_kernel(op: CustomOpDef, device_type: str) -> Callable[[Kernel], Kernel]:
    """Make a function the implementation of `op` on a type of device, as `op.register_kernel` does, for less at every call.

    That one keeps torch's compiler from looking into the function, for which it imports the compiler at the first call: it takes seconds.
    Until somebody else has imported it, there is nothing to keep out. Nor are outputs compared with inputs, which they never alias.
    """

    def register(function: Kernel) -> Kernel:
        @cache
        def kept_out() -> Callable[..., Any]:
            return torch.compiler.disable(function)

        def implementation(*arguments: Any) -> Any:
            return kept_out()(*arguments) if "torch._dynamo" in sys.modules else function(*arguments)

        op._lib.impl(op._name, implementation, device_type.upper())
        return function

    return register


def register_reference_autograd(op: CustomOpDef, reference: Callable[..., Any]) -> None:
    """Give `op` the gradient of its reference, which the backward pass runs again from the saved inputs.

    Integer outputs are not differentiable. Inputs may be tensors of any dtype, None or plain values.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.mark_non_differentiable(*(value for value in _as_tuple(output) if not value.is_floating_point()))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.values, strict=True)]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        for index, is_tensor in enumerate(ctx.is_tensor):
            if is_tensor:
                inputs[index] = inputs[index].detach()
        for index in wanted:
            inputs[index].requires_grad_()
        with torch.enable_grad():
            outputs = _as_tuple(reference(*inputs))
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
        result: list[Tensor | None] = [None] * len(inputs)
        if pairs and wanted:
            leaves = [inputs[index] for index in wanted]
            found = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
            for index, grad in zip(wanted, found, strict=True):
                result[index] = grad
        return tuple(result)

    op.register_autograd(backward, setup_context=setup_context)


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
