"""Calls every peer of `benchmarks/kernels.py` once, in processes of their own: none that hangs or crashes may take a run with it.

    python benchmarks/_trials.py --json PATH [--op ssd_scan ...] [--case M ...] [--limit 180] [--side-by-side 8]

Kernels that are compiled here are found again in Triton's cache; what torch's compiler measures here, beside other work, is thrown away.
"""

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Thread
from typing import Any

LIMIT_S = 180.0
SIDE_BY_SIDE = 8
Outcome = dict[str, Any]  # op, case, peer, and either seconds or reason


def attempts(op: str, name: str, peers: Sequence[str], limit: float) -> Iterator[Outcome]:
    """Make and call a case's peers in this process, which ends where one takes longer than `limit` seconds."""
    import torch
    from kernel_cases import all_cases

    case = next(case for case in all_cases() if (case.op, case.name) == (op, name))
    with torch.inference_mode():
        inputs = case.make()
        for peer in peers:
            torch._dynamo.reset()
            found: Outcome = {"op": op, "case": name, "peer": peer}
            begun = time.perf_counter()
            faulthandler.dump_traceback_later(limit, exit=True)
            try:
                case.peers[peer](inputs)()
                torch.cuda.synchronize()
                found["seconds"] = time.perf_counter() - begun
            except Exception as error:  # whatever a peer raises is the answer
                found["reason"] = reason_of(error)
            faulthandler.cancel_dump_traceback_later()
            yield found
            torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def shared_cache() -> dict[str, str]:
    """The environment, in which Triton's cache is not torch's compiler's own."""
    return {"TRITON_CACHE_DIR": str(Path.home() / ".triton/cache")} | os.environ


def apart(op: str, name: str, peers: Sequence[str], limit: float) -> list[Outcome]:
    """The outcomes of a case's peers, tried in a process of their own, and in another one after each that takes the process with it."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(peers):
        left = peers[len(outcomes) :]
        with tempfile.TemporaryDirectory() as cache:
            environment = shared_cache() | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--one", op, name, str(limit), *left]
            with tempfile.TemporaryFile() as errors:  # nobody would read a pipe meanwhile
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
                errors.seek(0)
                complaint = why(errors.read().decode(errors="replace"), limit)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"op"')]
        outcomes += found
        if len(found) < len(left):
            outcomes.append({"op": op, "case": name, "peer": left[len(found)], "reason": complaint})
    return outcomes


def why(errors: str, limit: float) -> str:
    """What a process that ended says: where it was when its time was up, or its last line."""
    lines = errors.strip().splitlines() or ["the process ended without a word"]
    start = next((at for at, line in enumerate(lines) if line.startswith("Timeout (")), None)
    if start is None:
        return lines[-1].strip()[:200]
    # The main thread comes last, its innermost frame first.
    threads = [at for at, line in enumerate(lines) if "(most recent call first)" in line]
    found = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+) in (.*)', "\n".join(lines[max(threads, default=start) :]))
    inside = ", called by ".join(f"{function} ({file}:{line})" for file, line, function in found[:3])
    return f"no answer within {limit:.0f} s in a process of its own; it was in {inside}"


def tried(cases: Sequence[Any], wanted: Sequence[str], limit: float = LIMIT_S, side_by_side: int = SIDE_BY_SIDE) -> Iterator[list[Outcome]]:
    """The outcomes of each case's peers, or of those named, as they come."""
    named = [(case, [peer for peer in case.peers if not wanted or peer in wanted]) for case in cases]
    with ThreadPoolExecutor(side_by_side) as processes:
        jobs = [processes.submit(apart, case.op, case.name, peers, limit) for case, peers in named if peers]
        for job in as_completed(jobs):
            yield job.result()


def end_with(parent: int) -> None:
    """Leave with the process that wanted to know: a peer that hangs would use the device on."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def line(found: Outcome) -> str:
    """An outcome as text."""
    return f"{found['op']} {found['case']}, {found['peer']}: {found.get('reason') or format(found['seconds'], '.1f') + ' s'}"


def main() -> None:
    """One case's peers, or those of all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", nargs="*", default=[], help="ops; default all")
    parser.add_argument("--case", nargs="*", default=[], help="names of cases; default all")
    parser.add_argument("--peers", nargs="*", default=[], help="names of peers; default all")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds that a peer may take")
    parser.add_argument("--side-by-side", type=int, default=SIDE_BY_SIDE, help="processes at a time")
    parser.add_argument("--json", type=Path, help="where the outcomes go")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        op, name, limit, *peers = given.one
        Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        for outcome in attempts(op, name, peers, float(limit)):
            print(json.dumps(outcome), flush=True)
        return
    from kernel_cases import chosen

    outcomes: list[Outcome] = []
    for made in tried(chosen(given.op, given.case), given.peers, given.limit, given.side_by_side):
        outcomes += made
        for found in made:
            print(line(found), flush=True)
        if given.json:
            given.json.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
