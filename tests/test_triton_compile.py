"""Every configuration in the tables compiles for sm_90 on a machine without a GPU, with loads of 16 bytes where the work is memory's."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import triton_plans

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[1]
NARROW = {"selective_scan_kernel", "selective_scan_carry_kernel"}  # a thread has a channel, its neighbour the next
NARROW |= {"router_topk_kernel"}  # 64 logits of a token are two for each thread of a warp


@pytest.mark.parametrize("op", sorted(triton_plans.OPS))
def test_configurations_compile(op):
    # A process of its own: in this one, kernels may belong to the interpreter.
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests/triton_plans.py"), op]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines
    for kernel, for_hopper, wide in lines:
        assert for_hopper == "True", kernel
        assert int(wide) > 0 or kernel in NARROW, f"{kernel} reads less than 16 bytes a thread"
