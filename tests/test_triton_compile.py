"""The tables of configurations compile on a machine without a GPU; `make test-deep` does so for every architecture."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import triton_plans
from wm_kernels import triton_configs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[1]
NARROW = {"selective_scan_kernel", "selective_scan_carry_kernel"}  # a thread has a channel, its neighbour the next
NARROW |= {"router_topk_kernel"}  # 64 logits of a token are two for each thread of a warp
NARROW |= {"prepare"}  # without a rotation it reads steps alone
NARROW |= {"moe_count_kernel", "moe_offset_kernel", "moe_sort_kernel"}  # a thread has a pick
NARROW |= {"rope_angles_kernel"}  # one position of a token makes all of its angles
NARROW |= {"rank_candidates", "live_at_chunks", "list_live_keys"}  # scores of a head lie as far apart as there are heads
# attention_rope has those of attention.
TABLED = [op for op in sorted(triton_plans.OPS) if files("wm_kernels").joinpath(op, "triton_configs.json").is_file()]


@pytest.mark.parametrize("op", sorted(triton_plans.OPS))
def test_configurations_compile_for_sm_90(op):
    # A process of its own: in this one, kernels may belong to the interpreter.
    paths = [str(ROOT), str(ROOT / "kernels"), *sys.path]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests/triton_plans.py"), "--op", op, "--dtype", "float32", "bfloat16", "--arch", "sm_90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["dtype"] for one in made} == {"float32", "bfloat16"}
    for one in made:
        assert one["target"].startswith("sm_90"), one
        if one["dtype"] == "bfloat16":
            assert one["wide"] or one["kernel"] in NARROW, f"reads less than 16 bytes a thread: {one}"
            assert one["async"] or not one["kernel"].startswith("attend"), one  # rows go straight to shared memory
    if op.startswith("ssd_scan"):
        assert any(one["tensor cores"] for one in made if one["dtype"] == "bfloat16")


@pytest.mark.parametrize("op", TABLED)
def test_every_row_for_a_gpu_serves_a_plan_that_is_compiled(op, monkeypatch):
    used = []

    class Row(dict):
        def __getitem__(self, key):
            used.append(json.dumps(self)) if key == "values" else None
            return super().__getitem__(key)

    rows = json.loads(files("wm_kernels").joinpath(op, "triton_configs.json").read_text(encoding="utf-8"))
    own = triton_configs._rows
    monkeypatch.setattr(triton_configs, "_rows", lambda name: tuple(map(Row, rows)) if name == op else own(name))
    triton_configs.config.cache_clear()
    for dtype in triton_plans.DTYPES:
        for arch in triton_plans.SHARED:
            for _ in triton_plans.OPS[op](getattr(torch, dtype), arch):
                pass
    triton_configs.config.cache_clear()
    idle = [row for row in rows if row.get("arch") != "interpreter" and json.dumps(row) not in used]
    assert not idle
