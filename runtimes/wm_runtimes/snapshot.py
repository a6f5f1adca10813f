"""Snapshots: a copy of a session's state, in memory or as a safetensors file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wm_graph.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
_FORMAT = "wm-graph snapshot 1"


@dataclass(frozen=True)
class Snapshot:
    """The state of every row of a session at one moment. It stays valid however the session goes on.

    Attributes:
        fingerprint: `Bundle.fingerprint` of the bundle that it belongs to.
        name: name of the model, for messages.
        batch: rows.
        capacity: the session's capacity.
        position_B: tokens seen by each row, int64.
        leaves: leaf name -> array, without `position`; bfloat16 as uint16 bit patterns.
    """

    fingerprint: str
    name: str
    batch: int
    capacity: int
    position_B: Array
    leaves: dict[str, Array]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, to a temporary sibling first."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        header = {
            "format": _FORMAT,
            "bundle": self.fingerprint,
            "name": self.name,
            "batch": str(self.batch),
            "capacity": str(self.capacity),
        }
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file({**self.leaves, "position": self.position_B}, partial, metadata=header)
            os.replace(partial, target)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{target}: cannot write the snapshot ({error}); choose another path") from error
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Snapshot":
        """Read a file written by `save`.

        Raises:
            InputError: the file is missing, damaged or no snapshot.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable snapshot ({error}); save it again") from error
        numbers = [header.get("batch", ""), header.get("capacity", "")]
        if header.get("format") != _FORMAT or "position" not in leaves or not all(number.isdecimal() for number in numbers):
            raise InputError(f"{path}: no snapshot of a session (format {header.get('format')!r}, expected {_FORMAT!r})")
        position_B = leaves.pop("position")
        return Snapshot(header.get("bundle", ""), header.get("name", ""), int(numbers[0]), int(numbers[1]), position_B, leaves)
