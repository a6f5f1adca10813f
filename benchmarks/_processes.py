"""Fresh processes, timed from outside."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import Any

from _peers import NotRun


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    stdout: str
    seconds: float
    first_output_s: float  # from the start of the process to its first byte on stdout
    rss_mb: float  # peak resident memory, 1e6 bytes


def run_process(command: list[object]) -> Finished:
    """Start a process, wait for it, and say how long it took and how much memory it held.

    Raises:
        NotRun: it failed; the reason is the last line on its stderr.
    """
    start = time.perf_counter()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [str(word) for word in command]
    # stderr goes to a file in memory: a pipe that nobody reads would block the process once full.
    with open(os.memfd_create("stderr"), "w+b") as errors:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environ)
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_output = time.perf_counter() - start
        rest = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        process.stdout.close()
        errors.seek(0)
        complaints = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    if process.returncode != 0:
        raise NotRun((complaints[-1] if complaints else f"exit code {process.returncode}")[:200])
    return Finished((first + rest).decode(errors="replace"), seconds, first_output, usage.ru_maxrss * 1024 / 1e6)


def run_json(command: list[object]) -> dict[str, Any]:
    """The JSON on the last line that a process prints.

    Raises:
        NotRun: it failed.
    """
    found: dict[str, Any] = json.loads(run_process(command).stdout.splitlines()[-1])
    return found
