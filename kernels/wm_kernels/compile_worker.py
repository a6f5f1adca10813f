"""A process that compiles kernels, one at a time: a line of JSON in, a line of JSON out.

It is a process of its own because the caller's may have chosen Triton's interpreter, and because half of a compilation is Python.
"""

import base64
import json
import os
import sys
from typing import Any


def _compile(wanted: dict[str, Any]) -> dict[str, Any]:
    from wm_kernels.native import Kernel
    from wm_kernels.triton_compile import compile_kernel

    module, name = wanted["function"]
    constants = tuple((key, value) for key, value in wanted["constants"])
    kernel = Kernel((module, name), tuple(wanted["parameters"]), constants, wanted["warps"], wanted["stages"], wanted["max_registers"])
    made = compile_kernel(kernel, wanted["capability"])
    return {
        "name": made.metadata.name,
        "cubin": base64.b64encode(made.asm["cubin"]).decode(),
        "ptx": made.asm["ptx"],
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "scratch": {kind: getattr(made.metadata, f"{kind}_scratch_size") for kind in ("global", "profile")},
        "blocks_of_cluster": made.metadata.num_ctas,
    }


def main() -> None:
    """Serve lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
