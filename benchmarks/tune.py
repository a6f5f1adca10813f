"""Tries configurations of Triton kernels on the CUDA device, each checked before it is timed, and writes the best into the op's table.

    python benchmarks/tune.py [--op expert_mix ...] [--write]

Without --write it prints only. Compilation runs in processes beside the one that measures, without CUDA, and fills Triton's own cache.
"""

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from _timing import graph_microseconds, microseconds
from kernel_cases import Inputs, Space, all_spaces

from wm_kernels import native_ops, triton_configs, triton_launch

Values = dict[str, int]
Compilation = tuple[str, str, tuple[Any, ...], dict[str, Any]]  # module, kernel, arguments with dtypes for tensors, constants and options
KERNELS = Path(triton_configs.__file__).parent
QUICK, LONG = 20, 60  # ms of repeats: of every candidate, of the best few
FINALISTS = 3
GRAPHED = 150.0  # microseconds: faster calls are timed as a CUDA graph


def force(op: str, regime: str = "", values: Mapping[str, int] | None = None) -> None:
    """Make the op use these values in the regime, whatever its table says; without any go back to the table."""
    row = MappingProxyType({"regime": regime, "values": values})
    rows = _rows if values is None else lambda name: (row, *_rows(name)) if name == op else _rows(name)
    triton_configs._rows = rows  # type: ignore[assignment]
    triton_configs.config.cache_clear()
    if (plan := part_of(op, "plan")) is None:
        return
    for function in vars(plan).values():
        if hasattr(function, "cache_clear") and function.__module__.endswith(f"{op}.plan"):
            function.cache_clear()


def part_of(op: str, name: str) -> ModuleType | None:
    """A module of an op's folder; None where the op has another's, as scans with rotation have those of scans."""
    module = f"wm_kernels.{op}.{name}"
    return importlib.import_module(module) if find_spec(module) else None


_rows = triton_configs._rows


def compilations(space: Space, values: Values, inputs: Inputs) -> list[Compilation]:
    """What a call with these values compiles, found by a call that launches nothing."""
    found: list[Compilation] = []

    def record(plan: triton_launch.Plan, tensors: Mapping[str, torch.Tensor]) -> None:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | {name: made.dtype for name, made in plan.scratch.items()}
        for launch in plan.launches:
            arguments = tuple(dtypes[value] if isinstance(value, str) else value for value in launch.arguments)
            found.append((launch.kernel.fn.__module__, launch.kernel.fn.__name__, arguments, {**launch.constants, **launch.options}))

    launch_now = triton_launch.run
    callers = [module for name, module in sys.modules.items() if name.startswith("wm_kernels.") and vars(module).get("run") is launch_now]
    force(space.case.op, space.regime, values)
    for module in callers:
        vars(module)["run"] = record
    try:
        space.case.ours(inputs)
    finally:
        for module in callers:
            vars(module)["run"] = launch_now
    return found


class _Elsewhere:
    """A driver that knows what to compile for, and cannot launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def compile_one(capability: int, job: Compilation) -> str | None:
    """Compile into Triton's cache, as a launch would; the error's first line if it cannot be compiled."""
    from triton.runtime import driver

    module, name, arguments, options = job
    try:
        driver.set_active(_Elsewhere(capability))
        getattr(importlib.import_module(module), name).warmup(*arguments, grid=(1,), **options)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def measure(space: Space, values: Values, inputs: Inputs, ms: int) -> float:
    """Median microseconds of a call, or infinity if it is wrong or cannot run."""
    force(space.case.op, space.regime, values)
    try:
        error = space.case.oracle(inputs)
        if not error <= 1:
            print(f"  {space.case.op} {space.case.name} {values}: {error:.3g} times its budget", flush=True)
            return float("inf")
        us = microseconds(lambda: space.case.ours(inputs), ms)
        # The host's part of a fast call is the same for all and hides the difference.
        return us if us > GRAPHED else graph_microseconds(lambda: space.case.ours(inputs), ms) or us
    except Exception as failure:
        print(
            f"  {space.case.op} {space.case.name} {values}: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:120]}",
            flush=True,
        )
        return float("inf")


class Trial:
    """A space while it is tuned. The first group is compiled from the start, beside the measurements of other spaces."""

    def __init__(self, space: Space, pool: ProcessPoolExecutor) -> None:
        self.space, self.pool = space, pool
        self.inputs, self.best, self.log = space.case.make(), dict(space.start), list[dict[str, Any]]()
        self.capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        self.compiling = self.submit(space.groups[0])

    def submit(self, group: Sequence[Values]) -> list[tuple[Values, list[Future[str | None]]]]:
        """Begin to compile every candidate of a group."""
        jobs: dict[str, Future[str | None]] = {}
        candidates = [self.best | dict(values) for values in group]
        found = []
        for values in candidates:
            for job in compilations(self.space, values, self.inputs):
                jobs.setdefault(repr(job), self.pool.submit(compile_one, self.capability, job))
            found.append((values, [jobs[repr(job)] for job in compilations(self.space, values, self.inputs)]))
        return found

    def run(self) -> Values:
        """The best values, group after group."""
        case = self.space.case
        for index, group in enumerate(self.space.groups):
            begun = time.perf_counter()
            found = self.compiling if index == 0 else self.submit(group)
            tried = [values for values, jobs in found if not any(job.result() for job in jobs)]
            compiled = time.perf_counter()
            times = sorted(((measure(self.space, values, self.inputs, QUICK), values) for values in tried), key=lambda row: row[0])
            finals = [(measure(self.space, values, self.inputs, LONG), values) for _, values in times[:FINALISTS]]
            micros, self.best = min(finals, key=lambda row: row[0], default=(float("inf"), self.best))
            self.log += [{"op": case.op, "case": case.name, "us": us, "values": values} for us, values in (*times, *finals)]
            spent = f"waited {compiled - begun:.0f} s, measured {time.perf_counter() - compiled:.0f} s"
            chosen = {name: self.best[name] for name in group[0]}
            print(f"{case.op} {case.name} {self.space.regime}: {micros:.1f} us {chosen}; {spent}, {len(tried)} of {len(group)}", flush=True)
            for us, values in times[1:5]:
                print(f"    {us:8.1f} { ({name: values[name] for name in group[0]}) }", flush=True)
        force(case.op)
        return self.best


def write(space: Space, best: Values, arch: str) -> None:
    """Put the row before those that serve everything, in place of one for the same."""
    path = KERNELS / space.case.op / "triton_configs.json"
    row = {"arch": arch, "dtype": space.case.dtype, "regime": space.regime} | ({"dims": dict(space.dims)} if space.dims else {})
    rows = [kept for kept in json.loads(path.read_text(encoding="utf-8")) if {key: kept[key] for key in kept if key != "values"} != row]
    # A row that names dimensions comes before one that does not.
    place = next((i for i, other in enumerate(rows) if "arch" not in other or (not other.get("dims") and other["arch"] == arch)), len(rows))
    rows.insert(place if space.dims else _after(rows, arch), row | {"values": best})
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


def _after(rows: list[dict[str, Any]], arch: str) -> int:
    """Behind the rows of other architectures and those of this one, before the general ones."""
    return next((i for i, other in enumerate(rows) if "arch" not in other), len(rows))


def main() -> None:
    """Tune the spaces that are asked for."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", nargs="*", default=[], help="ops, or op:regime; default all that have spaces")
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--log", type=Path, help="write all that was measured as JSON")
    given = parser.parse_args()
    wanted = [space for space in all_spaces() if not given.op or {space.case.op, f"{space.case.op}:{space.regime}"} & set(given.op)]
    for op in native_ops.OPS:  # whose calls are recorded where they are launched
        part_of(op, "triton_op")
    # Forked before anything touches CUDA, which does not survive a fork.
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result()
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: configurations are measured")
        arch, log = triton_launch.architecture(torch.device("cuda")), list[dict[str, Any]]()
        trials = [Trial(space, pool) for space in wanted]
        for trial in trials:
            best = trial.run()
            log += trial.log
            if given.write and trial.log:
                write(trial.space, best, arch)
            if given.log:
                given.log.write_text(json.dumps(log), encoding="utf-8")
            trial.inputs.clear()


if __name__ == "__main__":
    main()
