"""How long the first call of every op takes: a process of its own, an empty Triton cache, after torch and the device are up.

    python benchmarks/first_calls.py [--op ssd_scan ...] [--side-by-side 1] [--json PATH]

The file's figures of cases that are not measured this time stay: it is written by this script alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Beside the first case of each op: calls that compile other kernels than that one does.
ALSO = (("ssd_scan_rope", "cheems-1.3b T 8192"), ("ssd_scan_rope", "cheems-320m T 8192"), ("moe_mix", "E 64 k 8, own"))


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


def chosen(ops: Sequence[str], everything: bool) -> list[tuple[str, str]]:
    """Op and name of the cases to measure: of the ops that are named, or of all."""
    from kernel_cases import all_cases

    cases = [(case.op, case.name) for case in all_cases() if not ops or case.op in ops]
    first = {op: name for op, name in reversed(cases)}
    return [case for case in cases if everything or first[case[0]] == case[1] or case in ALSO]


def merged(before: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both, in the order in which their cases first came; what was found counts."""
    rows = {(row["op"], row["case"]): row for row in (*before, *found)}
    return list(rows.values())


def main() -> None:
    """Measure and print; write if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", nargs="*", default=[], help="ops; default all")
    parser.add_argument("--all", action="store_true", help="every case, not the first of each op and those of other kernels")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes at a time; more than one disturb each other")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(first_call(*given.one))
        return
    wanted = chosen(given.op, given.all)
    before = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else []
    with ThreadPoolExecutor(given.side_by_side) as processes:
        found = []
        for (op, name), value in zip(wanted, processes.map(lambda case: apart(*case), wanted), strict=True):
            print(f"{op} {name}: {value if isinstance(value, str) else f'{value:.2f} s'}", flush=True)
            found.append({"op": op, "case": name, "first_call_s": value})
            if given.json:
                given.json.write_text(json.dumps(merged(before, found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
