"""Small calls of every op through libwm_kernels, for compute-sanitizer: `make test-gpu-memory`.

The kernels lie in the folder that WM_NATIVE_TEST_KERNELS names; `--compile` makes them there, outside the sanitizer.
"""

import argparse
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor has an allocation of its own, whose ends are watched

import torch

from native_cases import CONFIGURATIONS, declaration, use_of
from native_gpu import KERNELS, SIZES, LibraryCall, compiled, named_folder, values_of
from wm_runtimes.native_kernels import NativeKernels

LONG = ("causal_conv1d", "selective_scan", "ssd_scan", "ssd_scan_rope", "keep_window_attention")  # beyond one chunk the others do the same


def main() -> None:
    """Compile, or call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile the kernels of all cases, and call nothing")
    given = parser.parse_args()
    folder = named_folder()
    if folder is None:
        sys.exit(f"{KERNELS} names no folder; set it to one for the compiled kernels")
    compiled(folder)
    if given.compile:
        return
    with NativeKernels(folder) as kernels:
        for op, every in CONFIGURATIONS.items():
            use = use_of(op, min(1, len(every) - 1), torch.bfloat16)
            states = any(one.alias in dict(use.dtypes) for one in declaration(op).outputs)
            for seed, sizes in enumerate(SIZES[: 4 if op in LONG else 3]):
                for in_place in (True, False) if states else (False,):
                    print(op, sizes, "in place" if in_place else "apart", flush=True)
                    values = {name: value.cuda() for name, value in values_of(use, sizes, seed, "cpu").items()}
                    call = LibraryCall(kernels, use, values, in_place)
                    call.launch()
                    torch.cuda.synchronize()
                    call.op.close()
    print("every op was called through the library")


if __name__ == "__main__":
    main()
