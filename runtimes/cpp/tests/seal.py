"""Writes digest, sizes and hashes into a plans.json that was edited by hand, from the cubins beside it: `python seal.py tests/golden`."""

import hashlib
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
path = folder / "plans.json"
plans = json.loads(path.read_text())
for kernel in plans["kernels"].values():
    for entry in kernel["files"].values():
        content = (folder / entry["file"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
zeros = "0" * 64
text = json.dumps(plans | {"digest": zeros}, sort_keys=True, indent=1)
path.write_text(text.replace(zeros, hashlib.sha256(text.encode()).hexdigest(), 1))
