"""The decode state in a GPU's memory, which ONNX Runtime owns: one block, its leaves at fixed addresses. Imports no torch.

bfloat16 is held as uint16 bit patterns where numpy sees it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wm_graph.errors import CapacityError
from wm_runtimes.bundle import StateLeaf
from wm_runtimes.cuda_device import fill_memory
from wm_runtimes.state_buffers import STORAGE, Array, Buffers, reset_value

ALIGNMENT = 256  # bytes: of each leaf
ROW_ALIGNMENT = 16  # bytes: what kernels are compiled for
ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7}  # onnx.TensorProto.DataType


class Device:
    """Memory of the provider that a model of ONNX Runtime runs on.

    Args:
        model: the `InferenceSession`, for which views are made.
        kind: `cuda`, or `cpu` for host memory.
        number: of the device.
    """

    def __init__(self, model: Any, kind: str, number: int) -> None:
        self._model, self.kind, self.number = model, kind, number
        self._output = model.get_outputs()[0].name

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """New memory as an OrtValue.

        Raises:
            CapacityError: there is not enough.
        """
        from onnxruntime import OrtValue

        try:
            return OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.kind, self.number)
        except Exception as error:  # ONNX Runtime's own classes have no public common base
            size = math.prod(shape) * np.dtype(dtype).itemsize
            raise CapacityError(f"no {size / 1e9:.2f} GB on the GPU for the state; use a smaller batch or capacity") from error

    def view(self, address: int, shape: Sequence[int], dtype: Any) -> Any:
        """Memory at an address as an OrtValue that does not own it."""
        binding = self._model.io_binding()
        binding.bind_output(self._output, self.kind, self.number, dtype, list(shape), address)
        return binding.get_outputs()[0]

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> Array:
        """A copy of memory in numpy."""
        return np.array(self.view(address, shape, dtype).numpy()) if math.prod(shape) else np.empty(shape, dtype)

    def write(self, address: int, array: Array) -> None:
        """Copy an array to memory; it is there when this returns."""
        if array.size:
            self.view(address, array.shape, array.dtype).update_inplace(np.ascontiguousarray(array))

    def fill(self, values: Sequence[tuple["Place", float]]) -> None:
        """Set every element of each place to its value, which is there when this returns; on a GPU nothing is copied to it."""
        pieces = []
        for place, value in values:
            word = _word(value, place.dtype) if self.kind == "cuda" else None
            if word is None or place.address % 4 or place.bytes % 4:
                self.write(place.address, np.full(place.shape, value, place.dtype))
            else:
                pieces.append((place.address, place.bytes // 4, word))
        if pieces:
            fill_memory(self.number, pieces)


def _word(value: float, dtype: Any) -> int | None:
    """The 4 bytes that repeat in an array of this value, or None."""
    data = np.full(8 // np.dtype(dtype).itemsize, value, dtype).view(np.uint32)
    return int(data[0]) if data[0] == data[1] else None


@dataclass(frozen=True)
class Place:
    """Where a leaf lies: its address, shape, and dtype in numpy."""

    address: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * int(np.dtype(self.dtype).itemsize)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, count: int) -> "Place":
        """Some of its rows."""
        return Place(self.address + start * self.row_bytes, (count, *self.shape[1:]), self.dtype)


class DeviceBuffers(Buffers):
    """Every leaf but `position`, on the device.

    Args:
        device: whose memory.
        leaves: the leaves.
        batch: rows.
        capacity: most tokens per row.
        keep_window: slots of a window.
        whole_windows: give windows all their slots though the capacity is smaller, as native kernels want them; copies that leave the
            device have the slots that any session of this capacity has.

    Attributes:
        places: leaf name -> where it lies.

    Raises:
        CapacityError: there is not enough memory.
    """

    def __init__(
        self, device: Device, leaves: Sequence[StateLeaf], batch: int, capacity: int, keep_window: int, whole_windows: bool = False
    ) -> None:
        super().__init__(leaves, batch)
        self.device = device
        self._slots = min(keep_window, capacity)
        room = max(capacity, keep_window) if whole_windows else capacity
        shapes = {leaf.name: leaf.concrete_shape(batch, capacity, keep_window) for leaf in self.leaves}
        self._windows = {leaf.name: leaf.shape.index("window") for leaf in self.leaves if "window" in leaf.shape}
        shapes |= {leaf.name: leaf.concrete_shape(batch, room, keep_window) for leaf in self.leaves if leaf.name in self._windows}
        self.places: dict[str, Place] = {}
        ends = [0]
        for leaf in self.leaves:
            place = Place(ends[-1], shapes[leaf.name], STORAGE[leaf.dtype])
            self.places[leaf.name] = place
            ends.append(-(-(ends[-1] + batch * place.row_bytes) // ALIGNMENT) * ALIGNMENT)
        self._block = device.empty([ends[-1] + ALIGNMENT], np.uint8)
        first = -(-self._block.data_ptr() // ALIGNMENT) * ALIGNMENT
        self.places = {name: Place(first + place.address, place.shape, place.dtype) for name, place in self.places.items()}
        self.reset(np.arange(batch))

    @property
    def rows_are_aligned(self) -> bool:
        """Whether kernels may be handed any of the rows as a first one."""
        return all(place.row_bytes % ROW_ALIGNMENT == 0 for place in self.places.values())

    def read(self, name: str, start: int, count: int) -> Array:
        """A copy of some rows of a leaf, as they lie."""
        place = self.places[name].rows(start, count)
        return self.device.read(place.address, place.shape, place.dtype)

    def write(self, name: str, start: int, rows: Array) -> None:
        """Overwrite some rows of a leaf, as they lie."""
        self.device.write(self.places[name].rows(start, len(rows)).address, rows)

    def save(self, start: int, count: int) -> dict[str, Array]:
        """Copies of some rows of every leaf, as they lie."""
        return {name: self.read(name, start, count) for name in self.places}

    def load(self, start: int, saved: dict[str, Array]) -> None:
        """Write what `save` gave."""
        for name, rows in saved.items():
            self.write(name, start, rows)

    def reset(self, rows: Array) -> None:
        """See `Buffers`."""
        ordered = np.sort(rows)
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1):
            if run.size:
                self.device.fill([(self.places[leaf.name].rows(int(run[0]), run.size), reset_value(leaf)) for leaf in self.leaves])

    def permute(self, rows: Array) -> None:
        """See `Buffers`."""
        self.gather(self, rows)

    def gather(self, source: "DeviceBuffers", rows: Array) -> None:
        """See `Buffers`; by way of the host."""
        for name in self.places:
            taken = source.read(name, 0, source.batch)
            self.write(name, 0, taken[rows])

    def scatter(self, target: "DeviceBuffers", rows: Array) -> None:
        """See `Buffers`; by way of the host."""
        for name in self.places:
            for row, values in zip(rows.tolist(), self.read(name, 0, self.batch), strict=True):
                target.write(name, row, values[None])

    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `Buffers`."""
        found = {}
        for name, place in self.places.items():
            shape = list(place.shape)
            if name in self._windows:
                shape[self._windows[name]] = self._slots
            found[name] = (tuple(shape), np.dtype(place.dtype).name)
        return found

    def copy(self) -> dict[str, Array]:
        """See `Buffers`."""
        arrays = self.save(0, self.batch)
        return {name: arrays[name] if name not in self._windows else self._used_slots(name, arrays) for name in arrays}

    def fill(self, arrays: dict[str, Array]) -> None:
        """See `Buffers`."""
        for leaf in self.leaves:
            place = self.places[leaf.name]
            array = arrays[leaf.name]
            if leaf.name in self._windows and array.shape != place.shape:
                whole = np.full(place.shape, reset_value(leaf), place.dtype)
                np.moveaxis(whole, self._windows[leaf.name], 0)[: self._slots] = np.moveaxis(array, self._windows[leaf.name], 0)
                array = whole
            self.write(leaf.name, 0, array)

    def _used_slots(self, name: str, arrays: dict[str, Array]) -> Array:
        """The slots that hold something, in order, and empty ones up to what a session of this capacity has.

        The order of slots has no meaning; leaves of one window are ordered alike, by its positions, -1 of an empty slot.
        """
        array = arrays[name]
        if array.shape[self._windows[name]] == self._slots:
            return array
        layer = name.rpartition(".")[0]
        position_BKW = arrays[f"{layer}.slot_position"]
        order_BKW = np.argsort(position_BKW < 0, axis=-1, kind="stable")[..., : self._slots]
        extra = array.ndim - order_BKW.ndim
        return np.take_along_axis(array, order_BKW.reshape(*order_BKW.shape, *[1] * extra), self._windows[name])
