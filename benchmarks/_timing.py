"""Times of calls on the CUDA device."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

REPEAT_MS = 100
SLOW_MS = 100.0  # a call that takes longer is repeated three times and no more


def microseconds(call: Callable[[], Any], ms: int = REPEAT_MS) -> float:
    """Median of repeated calls after one that warms up; the L2 cache is emptied before each."""
    from triton.testing import do_bench

    call()
    once = _once(call)
    if once > SLOW_MS:
        return 1e3 * median([once, _once(call), _once(call)])
    return 1e3 * float(do_bench(call, warmup=ms // 4, rep=ms, return_mode="median"))


def _once(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def graph_microseconds(call: Callable[[], Any], ms: int = REPEAT_MS) -> float | None:
    """The call replayed as a CUDA graph, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return microseconds(graph.replay, ms)
