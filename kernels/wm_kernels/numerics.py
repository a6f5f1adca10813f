"""In which order the CUDA kernels may add: the fastest one, or one that no split of the tokens changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MODES = ("fast", "exact")
_mode = ContextVar("numerics", default="fast")


@contextmanager
def numerics(mode: str) -> Iterator[None]:
    """Within the block, run the ops' CUDA kernels in this mode; it holds for the thread, or the task, that enters it.

    In "exact", a call on T tokens gives the bits of T calls on one token each, and so of any split of them, states and slots included. It
    costs up to twice a step's time for every token. "fast", the default, adds in whatever order is fastest at T. On the CPU, and for
    float64, the mode changes nothing. Custom ops look at it when they run, in functions that torch.compile compiled too; a captured CUDA
    graph keeps the mode that it was captured in.

    Args:
        mode: "fast" or "exact".

    Raises:
        ValueError: mode is neither.
    """
    if mode not in MODES:
        raise ValueError(f"numerics: mode is {mode!r}, expected one of {', '.join(MODES)}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def exact() -> bool:
    """Whether the mode is "exact"."""
    return _mode.get() == "exact"
