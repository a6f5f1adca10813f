"""Measuring one runtime in a process of its own, so that start-up and memory are its own too."""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from wm_graph.errors import RuntimeUnavailableError


def measure_apart(bundle: Path, runtime: str, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Run `measure` in a fresh process.

    Raises:
        WmError: as the session raised it there.
        RuntimeUnavailableError: the process died.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, str(bundle), runtime, prompt_tokens, new_tokens, repeats, time.time()).result()
        except BrokenProcessPool:
            raise RuntimeUnavailableError(f"{runtime}: its process died, for want of memory perhaps; try fewer tokens") from None


def measure(bundle: str, runtime: str, prompt_tokens: int, new_tokens: int, repeats: int, started: float) -> dict[str, Any]:
    """Open a session, warm it up, and time prefill and decode; `started` is when the process was asked for."""
    import numpy as np

    from wm_runtimes import open_bundle
    from wm_runtimes.labels import open_labelled

    with open_labelled(open_bundle(bundle), runtime, batch=1, capacity=prompt_tokens + new_tokens + 1) as session:
        open_s = time.time() - started
        tokens_BT = np.random.default_rng(0).integers(0, session.bundle.limits.vocab_size, (1, prompt_tokens))
        prefill_s, decode_s = [], []
        warm_up = time.perf_counter()
        session.decode(session.prefill(tokens_BT)[:, 0].argmax(-1))
        warm_up_s = time.perf_counter() - warm_up
        for _ in range(repeats):
            session.reset()
            begin = time.perf_counter()
            logits_BV = session.prefill(tokens_BT)[:, 0]
            middle = time.perf_counter()
            for _ in range(new_tokens):
                logits_BV = session.decode(logits_BV.argmax(-1))
            prefill_s.append(middle - begin)
            decode_s.append(time.perf_counter() - middle)
    return {
        "runtime": runtime,
        "prefill_tokens_per_s": prompt_tokens / statistics.median(prefill_s),
        "decode_tokens_per_s": new_tokens / statistics.median(decode_s),
        "open_s": open_s,
        "warm_up_s": warm_up_s,
        "rss_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Most bytes this process has held in memory."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
