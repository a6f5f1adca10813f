"""Typed reading of metadata that comes from outside: every wrong value becomes one line naming file, key, value and expectation."""

from collections.abc import Iterable
from typing import Any

from wm_graph.errors import CheckpointError

REQUIRED: Any = object()  # the default of an entry that must be there


class Fields:
    """Key-value metadata of an import source, which remembers what was asked for.

    Attributes:
        label: the file, for messages.
        values: the raw metadata; looking here does not count as asking.
    """

    def __init__(self, label: str, values: dict[str, Any]) -> None:
        self.label = label
        self.values = values
        self._asked: set[str] = set()
        self._inner: dict[str, Fields] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value under `key`, or `default` where there is no such entry."""
        self._asked.add(key)
        return self.values.get(key, default)

    def inner(self, key: str) -> "Fields":
        """The object under `key`; an empty one where the entry is missing or null.

        Raises:
            CheckpointError: something else is there.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{self.label}: {key!r} is {clip(value)}; expected an object")
        return self._inner.setdefault(key, Fields(f"{self.label}: {key}", value or {}))

    def skip(self, keys: Iterable[str]) -> None:
        """Count entries as asked for whose values do not matter."""
        self._asked.update(keys)

    def asked(self) -> set[str]:
        """The keys that were asked for, here and in inner objects."""
        return self._asked.union(*(fields.asked() for fields in self._inner.values()))

    def unasked(self) -> dict[str, Any]:
        """The entries that nothing asked for; those of an inner object are called `key.entry`."""
        found = {key: value for key, value in self.values.items() if key not in self._asked}
        inner = {f"{key}.{name}": value for key, fields in self._inner.items() for name, value in fields.unasked().items()}
        return found | inner

    def integer(self, key: str, default: Any = REQUIRED) -> int:
        """The whole number under `key`; a missing or null entry gives `default`.

        Raises:
            CheckpointError: missing without a default, or not a whole number.
        """
        return int(self._typed(key, (int,), "a whole number", default))

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """The number under `key`; see `integer`."""
        return float(self._typed(key, (int, float), "a number", default))

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """The true or false under `key`; see `integer`."""
        return bool(self._typed(key, (bool,), "true or false", default))

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """The text under `key`; see `integer`."""
        return str(self._typed(key, (str,), "text", default))

    def optional_text(self, key: str) -> str | None:
        """The text under `key`, or None where there is none."""
        return None if self.get(key) is None else self.text(key)

    def optional_id(self, key: str) -> int | None:
        """The token id under `key`, or None where there is none; old configurations write "none" as -1."""
        return None if self.get(key) in (None, -1) else self.integer(key)

    def texts(self, key: str) -> list[str]:
        """The list of texts under `key`."""
        return self._list(key, (str,), "a list of texts")

    def integers(self, key: str) -> list[int]:
        """The list of whole numbers under `key`."""
        return self._list(key, (int,), "a list of whole numbers")

    def numbers(self, key: str) -> list[float]:
        """The list of numbers under `key`."""
        return self._list(key, (int, float), "a list of numbers")

    def require(self, key: str, expected: Any) -> None:
        """Refuse any value but `expected`, which is also what a missing or null entry means.

        Raises:
            CheckpointError: another value is there.
        """
        if self.get(key) not in (None, expected):
            raise self.unsupported(key, repr(expected))

    def unsupported(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that means something wm-graph does not have."""
        return CheckpointError(f"{self.label}: {key} is {clip(self.values.get(key))}, which wm-graph does not support; expected {expected}")

    def _typed(self, key: str, types: tuple[type, ...], kind: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(f"{self.label}: {key!r} is missing; expected {kind}")
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise CheckpointError(f"{self.label}: {key!r} is {clip(value)}; expected {kind}")
        return value

    def _list(self, key: str, types: tuple[type, ...], kind: str) -> list[Any]:
        value = self._typed(key, (list,), kind, REQUIRED)
        if wrong := [item for item in value if not isinstance(item, types)]:
            raise CheckpointError(f"{self.label}: {key!r} holds {clip(wrong[0])}; expected {kind}")
        return list(value)


def clip(value: Any, width: int = 60) -> str:
    """The value as it would be written in Python, on one line and not longer than `width`."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
