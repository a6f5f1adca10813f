"""Times every op's CUDA kernels beside their peers, in one process, after checking that they are right.

    python benchmarks/kernels.py [--op ssd_scan ...] [--case M ...] [--peers eager ...] [--limit 180] [--json PATH] [--write]

Every peer is called once in a process of its own first; one that takes longer than the limit, or ends the process, is not called again.
Should a call take the measuring process along nevertheless, another process goes on, with rates of its own: a second run in the table.
Prints a table; --write puts it and a plot into docs/performance.md and docs/kernels.svg. A wrong result ends with exit code 1.
"""

import argparse
import faulthandler
import gc
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import _kernels_report
import _trials
import torch
from _timing import graph_microseconds, machine, microseconds, rates
from kernel_cases import Case, Inputs, chosen

ROOT = Path(__file__).parents[1]
Measured = dict[str, Any]
GRAPHED = 300.0  # microseconds: faster calls are also timed as a CUDA graph, without the host's part


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes of the device's memory at the worst moment of a call, beyond what was there before and what it returns."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = call()
    peak = torch.cuda.max_memory_allocated()
    # Of tuples alone: flex_attention's BlockMask answers every index, and would be walked through without end.
    values = made if isinstance(made, tuple | list) else (made,)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    returned = torch.cuda.memory_allocated() - before if tensors else 0
    return max(0, peak - before - returned)


def launches(call: Callable[[], Any]) -> int:
    """Kernels that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.self_device_time_total > 0)


def timed(call: Callable[[], Any]) -> Measured:
    """Median, extra memory."""
    call()
    return {"us": microseconds(call), "extra_bytes": extra_memory(call)}


def timed_on_device(call: Callable[[], Any]) -> Measured:
    """`timed`, and without the host's part where the host may be what is waited for."""
    found = timed(call)
    if found["us"] < GRAPHED:
        found["graph_us"] = graph_microseconds(call)
    return found


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End the process and say what every thread did where the block takes longer; 0: any time. A signal is not heard while C code waits."""
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def peer(case: Case, name: str, inputs: Inputs, limit: float) -> Measured:
    """A peer's figures, or why it cannot run."""
    say(at=[case.op, case.name, name])
    torch._dynamo.reset()
    try:
        with at_most(limit):
            return timed(case.peers[name](inputs))
    except Exception as error:  # whatever a peer raises is the answer
        return {"reason": _trials.reason_of(error)}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def measure(case: Case, wanted: list[str], reasons: Mapping[str, str], limit: float) -> Measured:
    """Everything about one case; peers that have a reason not to be called are not, and none is waited for longer than the limit."""
    say(at=[case.op, case.name, None])
    torch.manual_seed(0)
    with at_most(limit):
        inputs = case.make()
        found = ours(case, inputs)
    if found["error"] <= 1:
        names = [name for name in case.peers if not wanted or name in wanted]
        found["peers"] = {name: {"reason": reasons[name]} if name in reasons else peer(case, name, inputs, limit) for name in names}
    inputs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return found


def ours(case: Case, inputs: Inputs) -> Measured:
    """Whether our kernels are right, in each of their designs, and how fast."""
    begun = time.perf_counter()
    found = blank(case)
    try:
        found["error"] = case.oracle(inputs)
    except Exception as failure:  # one op that fails must not hide the others
        found |= {"error": float("inf"), "reason": _trials.reason_of(failure)}
    found["checked_s"] = time.perf_counter() - begun
    if not found["error"] <= 1:
        return found
    found |= {"ours": timed_on_device(partial(case.ours, inputs)), "launches": launches(partial(case.ours, inputs))}
    if case.designs:
        found["designs"] = {name: timed_on_device(partial(design, inputs)) for name, design in case.designs.items()}
    return found


def blank(case: Case) -> Measured:
    """What is known of a case before anything runs."""
    return {"op": case.op, "case": case.name, "dtype": case.dtype, "bytes": case.bytes, "flops": case.flops, "bars": dict(case.bars)}


def say(**what: Any) -> None:
    """A line for the process that asked."""
    print(json.dumps({"said": what}), flush=True)


def answer() -> None:
    """Measure what standard input asks for, in this process."""
    Thread(target=_trials.end_with, args=(os.getppid(),), daemon=True).start()
    asked = json.load(sys.stdin)
    say(run={"machine": machine(), "rates": rates()})
    for op, name in asked["cases"]:
        (case,) = chosen([op], [name])
        reasons = {peer: reason for *of, peer, reason in asked["reasons"] if of == [op, name]}
        with torch.inference_mode():  # as sessions run; an op that writes into its state costs torch less there
            say(found=measure(case, asked["peers"], reasons, asked["limit"]))


def gather(cases: Sequence[Case], peers: list[str], reasons: list[list[str]], limit: float, command: list[str]) -> Iterator[list[Measured]]:
    """Runs as they grow, after each case: a process measures all that is left, and where it ends too soon another one goes on.

    Args:
        cases: what to measure.
        peers: names of peers; none is all.
        reasons: op, case, peer and why it is not to be called.
        limit: seconds that our own kernels, or a peer, may take.
        command: starts a process that does `answer`.
    """
    left, runs = list(cases), list[Measured]()
    while left:
        asked = {"cases": [[case.op, case.name] for case in left], "peers": peers, "reasons": reasons, "limit": limit}
        at: list[str | None] = []
        with tempfile.TemporaryFile("w+") as questions, tempfile.TemporaryFile() as errors:
            json.dump(asked, questions)
            questions.seek(0)
            with subprocess.Popen(command, stdin=questions, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                for text in process.stdout or ():
                    said = json.loads(text)["said"] if text.startswith('{"said"') else {}
                    at = said.get("at", at)
                    if "run" in said:
                        runs.append(said["run"] | {"cases": []})
                    if "found" in said:
                        runs[-1]["cases"].append(said["found"])
                        left.pop(0)
                        yield runs
            errors.seek(0)
            complaint = _trials.why(errors.read().decode(errors="replace"), limit)
        if left and not at:
            raise SystemExit(f"kernels.py: the process that measures did not start: {complaint}")
        if left and at[2] is not None:
            reasons = [*reasons, [left[0].op, left[0].name, at[2], complaint]]
        elif left:
            runs[-1]["cases"].append(blank(left.pop(0)) | {"error": float("inf"), "reason": complaint})
            yield runs


def main() -> int:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", nargs="*", default=[], help="ops; default all")
    parser.add_argument("--case", nargs="*", default=[], help="names of cases; default all")
    parser.add_argument("--peers", nargs="*", default=[], help="names of peers; default all")
    parser.add_argument("--limit", type=float, default=_trials.LIMIT_S, help="seconds that a peer may take; 0: any time, and no trials")
    parser.add_argument("--trials", type=Path, help="what benchmarks/_trials.py wrote, in place of new trials")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/kernels.json", help="where the figures go, as they come in")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and docs/kernels.svg too")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels.py: no CUDA device on this machine; nothing was measured")
        return 0
    os.environ.update(_trials.shared_cache())
    if given.answer:
        answer()
        return 0
    cases = chosen(given.op, given.case)
    outcomes = json.loads(given.trials.read_text(encoding="utf-8")) if given.trials else []
    if given.limit and not given.trials:
        for made in _trials.tried(cases, given.peers, given.limit):
            outcomes += made
            print("tried:", "; ".join(map(_trials.line, made)), flush=True)
    reasons = [[outcome[key] for key in ("op", "case", "peer", "reason")] for outcome in outcomes if "reason" in outcome]
    results: Measured = {}
    for runs in gather(cases, given.peers, reasons, given.limit, [sys.executable, __file__, "--answer"]):
        print(_kernels_report.line(runs[-1]["cases"][-1], runs[-1]["rates"]), flush=True)
        results = _kernels_report.join(runs) if len(runs) > 1 else runs[0]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(_kernels_report.render(results))
    if given.write:
        _kernels_report.write(results, ROOT / "docs")
    wrong = [found for found in results["cases"] if not found["error"] <= 1]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
