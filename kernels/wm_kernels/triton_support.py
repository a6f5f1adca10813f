"""What the CUDA implementations of the ops share: whether Triton can serve a call, and tensors in the form that kernels take."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from wm_kernels.numerics import exact

# float64 is the reference's: it is the oracle that kernels are judged by.
SERVED = frozenset((torch.float32, torch.float16, torch.bfloat16))


@cache
def has_triton() -> bool:
    """Whether Triton is installed; the reference serves where it is not."""
    return find_spec("triton") is not None


def served(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels take these tensors: it is installed, and none is float64 or of a dtype without kernels."""
    return has_triton() and all(tensor is None or tensor.dtype in SERVED for tensor in tensors)


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis has stride 1, otherwise a contiguous copy: kernels read rows of 16 bytes a thread."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def same_rows(tensor_MD: Tensor) -> Tensor:
    """The matrix itself; with `numerics("exact")` one whose rows are added up alike however many there are.

    Alignment, of the first row and of the stride, decides how the compiler spreads a row over threads, and so in which order they add.
    """
    if not exact():
        return tensor_MD
    tensor_MD = tensor_MD.contiguous()
    return tensor_MD if tensor_MD.data_ptr() % 16 == 0 else tensor_MD.clone()


def row_stride(tensor_MD: Tensor) -> int:
    """The stride of a matrix's rows, one of `same_rows`; 0 of a single row, except with `numerics("exact")`."""
    if exact():
        return tensor_MD.shape[1]
    return 0 if tensor_MD.shape[0] == 1 else tensor_MD.stride(0)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16: the key of configurations."""
    return str(dtype).removeprefix("torch.")


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def can_wait(arch: str) -> bool:
    """Whether an architecture's kernels can start early and wait for the one ahead of them: `triton_early`."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
