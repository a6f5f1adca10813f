"""Moving memory to huge pages: which ranges are asked for, and that nothing changes but the pages."""

import subprocess
import sys

import pytest

from wm_runtimes import huge_pages
from wm_runtimes.huge_pages import private_memory, use_huge_pages


@pytest.mark.parametrize(
    ("ranges", "old", "expected"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 4), (6, 8)], [(0, 2), (4, 6), (8, 10)]),
        ([(0, 4), (6, 10)], [(3, 7)], [(0, 3), (7, 10)]),
        ([(5, 10)], [(0, 5), (10, 12)], [(5, 10)]),
    ],
)
def test_only_what_was_allocated_since_is_moved(ranges, old, expected):
    assert huge_pages._without(ranges, old) == expected


# In a process of its own: another library's memory comes and goes on huge pages too.
MOVES = """
import mmap
import numpy as np
from wm_runtimes.huge_pages import private_memory, use_huge_pages

MB = 1 << 20


def fresh_memory(size):
    \"\"\"Private anonymous memory, every page of it in use.\"\"\"
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.uint32)
    values[:] = np.arange(len(values))
    return values


def on_huge_pages():
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("AnonHugePages"))


old = fresh_memory(32 * MB)
before, huge_before = private_memory(), on_huge_pages()
values = fresh_memory(64 * MB)
moved = use_huge_pages(since=before)
assert np.array_equal(values, np.arange(len(values), dtype=np.uint32))
grown = on_huge_pages() - huge_before
assert not moved or 56 * MB <= grown <= moved + old.nbytes // 2, (moved, grown)
print(moved)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux alone")
def test_moved_memory_keeps_its_contents_and_old_memory_its_pages():
    done = subprocess.run([sys.executable, "-c", MOVES], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if int(done.stdout) == 0:
        pytest.skip("this kernel gives no huge pages on request (Linux 6.1 and later do)")


def test_a_system_that_lists_no_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert private_memory() == []
    assert use_huge_pages(since=[]) == 0
