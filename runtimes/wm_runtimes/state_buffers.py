"""The decode state as preallocated buffers, batch on axis 0, so that a range of rows is a view; here in numpy.

bfloat16, which numpy lacks, is held as uint16 bit patterns.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from wm_graph.errors import CapacityError
from wm_runtimes.bundle import StateLeaf

Array = np.ndarray[Any, np.dtype[Any]]
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64}
_BFLOAT16_MINUS_INF = 0xFF80
_ALIGNMENT = 64  # bytes, a cache line


class Buffers(ABC):
    """Every leaf but `position`, which sessions track themselves, wherever the memory is.

    Attributes:
        leaves: the leaves.
        batch: rows.
        bindings: whatever a runtime wants to remember about these buffers; it dies with them.
    """

    def __init__(self, leaves: Sequence[StateLeaf], batch: int) -> None:
        self.leaves = tuple(leaf for leaf in leaves if leaf.name != "position")
        self.batch = batch
        self.bindings: dict[Any, Any] = {}

    @abstractmethod
    def reset(self, rows: Array) -> None:
        """Empty some rows."""

    @abstractmethod
    def permute(self, rows: Array) -> None:
        """Row i becomes what row rows[i] was."""

    @abstractmethod
    def gather(self, source: Any, rows: Array) -> None:
        """Fill these buffers with the given rows of `source`, which are of the same kind."""

    @abstractmethod
    def scatter(self, target: Any, rows: Array) -> None:
        """Write these buffers to the given rows of `target`."""

    @abstractmethod
    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Leaf name -> shape and numpy dtype of what `copy` gives."""

    @abstractmethod
    def copy(self) -> dict[str, Array]:
        """A copy of every leaf in numpy."""

    @abstractmethod
    def fill(self, arrays: dict[str, Array]) -> None:
        """Overwrite every leaf; names, shapes and dtypes must be those of `copy`."""


class StateBuffers(Buffers):
    """The buffers in numpy.

    Attributes:
        arrays: leaf name -> buffer; the buffers keep their addresses for the life of this object.
    """

    def __init__(self, leaves: Sequence[StateLeaf], batch: int, capacity: int, keep_window: int) -> None:
        super().__init__(leaves, batch)
        try:
            self.arrays = _allocate({leaf: leaf.concrete_shape(batch, capacity, keep_window) for leaf in self.leaves})
        except (MemoryError, ValueError) as error:
            raise CapacityError(
                f"no memory for the state of batch {batch}, capacity {capacity}; use a smaller batch or capacity"
            ) from error

    def reset(self, rows: Array) -> None:
        """Empty some rows."""
        for leaf in self.leaves:
            self.arrays[leaf.name][rows] = reset_value(leaf)

    def permute(self, rows: Array) -> None:
        """Row i becomes what row rows[i] was."""
        for array in self.arrays.values():
            array[...] = array[rows]

    def gather(self, source: "StateBuffers", rows: Array) -> None:
        """Fill these buffers with the given rows of `source`."""
        for name, array in self.arrays.items():
            np.take(source.arrays[name], rows, axis=0, out=array)

    def scatter(self, target: "StateBuffers", rows: Array) -> None:
        """Write these buffers to the given rows of `target`."""
        for name, array in self.arrays.items():
            target.arrays[name][rows] = array

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `Buffers`."""
        return {name: (array.shape, array.dtype.name) for name, array in self.arrays.items()}

    def copy(self) -> dict[str, Array]:
        """A copy of every buffer."""
        return {name: array.copy() for name, array in self.arrays.items()}

    def fill(self, arrays: dict[str, Array]) -> None:
        """Overwrite every buffer; names, shapes and dtypes must be those of `copy`."""
        for name, array in self.arrays.items():
            array[...] = arrays[name]


def reset_value(leaf: StateLeaf) -> float:
    """What an empty state holds, as a number of its storage."""
    if leaf.dtype == "bfloat16":
        # Only 0 and -inf are ever reset values of float leaves.
        return _BFLOAT16_MINUS_INF if leaf.reset == -math.inf else 0
    return leaf.reset


def _allocate(shapes: dict[StateLeaf, tuple[int, ...]]) -> dict[str, Array]:
    """All leaves in one block of memory, which is big enough for numpy to ask for huge pages: a step reads most of it.

    Zero pages are mapped on first use: a large capacity costs no memory before it is filled.
    """
    sizes = {leaf: math.prod(shape) * np.dtype(STORAGE[leaf.dtype]).itemsize for leaf, shape in shapes.items()}
    starts = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values())]).tolist()
    memory = np.zeros(starts[-1] + _ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    arrays: dict[str, Array] = {}
    for start, (leaf, shape) in zip(starts, shapes.items(), strict=False):
        arrays[leaf.name] = memory[start : start + sizes[leaf]].view(STORAGE[leaf.dtype]).reshape(shape)
        if value := reset_value(leaf):
            arrays[leaf.name][...] = value
    return arrays
