"""What the tests of Triton kernels share: where they run, and how far they may be from the float64 reference.

Kernels run on the CUDA device where there is one, otherwise in Triton's interpreter, which conftest.py chooses.
"""

from collections.abc import Iterable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from wm_graph.tolerances import UNIT_ROUNDOFF, output_limit

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


def missing() -> str | None:
    """Why kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not ON_CUDA and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "Triton's interpreter needs numpy before 2.4"
    return None


needs_triton = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),  # the interpreter's own
]
# The interpreter's bfloat16 products are wrong (triton issue 11584).
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_CUDA else [])]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def scattered(tensor: Tensor, seed: int = 0) -> Tensor:
    """The same values behind other outer strides and a storage offset; rows stay contiguous. Around them lie NaNs."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tensor.dim() - 1, generator=generator).tolist()
    spare = torch.randint(0, 3, (tensor.dim(),), generator=generator).tolist()
    shape = [tensor.shape[axis] + spare[axis] for axis in (*order, tensor.dim() - 1)]
    if not tensor.dtype.is_floating_point:
        return tensor
    whole = torch.full([shape[0] + 1, *shape[1:]] if order else [shape[0] + 8], float("nan"), dtype=tensor.dtype, device=tensor.device)
    inverse = [order.index(axis) for axis in range(tensor.dim() - 1)]
    view = (whole[1:] if order else whole).permute(*inverse, tensor.dim() - 1)
    view = view[tuple(slice(0, size) for size in tensor.shape)]
    view.copy_(tensor)
    assert torch.equal(view, tensor)
    return view


def wide(values: Iterable[Tensor | None]) -> list[Tensor | None]:
    """In float64."""
    return [value.double() if value is not None and value.is_floating_point() else value for value in values]


def check(op: str, dtype: torch.dtype, actual: Tensor, expected: Tensor) -> None:
    """Within the op's limit of the float64 reference; see `output_limit` for an output that is float32."""
    limit = output_limit(op, name_of(dtype), name_of(torch.float32 if actual.dtype == torch.float32 else dtype), "triton")
    assert actual.isfinite().all()
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    error = (actual.double() - expected).abs().max().item()
    allowed = limit.ulps * UNIT_ROUNDOFF[limit.dtype] * expected.abs().max().item()
    assert error <= allowed, f"{op} {dtype}: off by {error:.3g}, {allowed:.3g} allowed"
