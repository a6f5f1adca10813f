"""Times of calls on the CUDA device, and what it does at best."""

import time
from collections.abc import Callable
from functools import partial
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


def rates() -> dict[str, Any]:
    """What the card does at best: bytes/s of a copy, read and written, and FLOP/s of a bf16 matrix product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds(partial(target.copy_, source)) * 1e6
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"copy_bytes_s": copy, "matmul_flop_s": 2 * 8192**3 / microseconds(lambda: a @ b) * 1e6}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }
