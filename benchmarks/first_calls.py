"""How long the first call of every op takes: a process of its own, an empty Triton cache, after torch and the device are up.

python benchmarks/first_calls.py [--op ssd_scan ...] [--side-by-side 1] [--json PATH]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def first_call(op: str, name: str) -> float:
    """Seconds of the first call of a case in this process."""
    import torch
    from kernel_cases import all_cases

    case = next(case for case in all_cases() if (case.op, case.name) == (op, name))
    inputs = case.make()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.inference_mode():
        case.ours(inputs)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def apart(op: str, name: str) -> float | str:
    """`first_call` in a process of its own; what went wrong, if something did."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", op, name]
        done = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no output"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", nargs="*", default=[], help="ops; default all")
    parser.add_argument("--all", action="store_true", help="every case, not the first of each op")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes at a time; more than one disturb each other")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(first_call(*given.one))
        return
    from kernel_cases import all_cases

    wanted = [(case.op, case.name) for case in all_cases() if not given.op or case.op in given.op]
    if not given.all:
        wanted = list({op: (op, name) for op, name in reversed(wanted)}.values())[::-1]
    with ThreadPoolExecutor(given.side_by_side) as processes:
        found = []
        for (op, name), value in zip(wanted, processes.map(lambda case: apart(*case), wanted), strict=True):
            print(f"{op} {name}: {value if isinstance(value, str) else f'{value:.2f} s'}", flush=True)
            found.append({"op": op, "case": name, "first_call_s": value})
            if given.json:
                given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
