"""Bundles of the tiny presets with native kernels for the GPU that is here, and why tests on them cannot run elsewhere."""

import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from wm_graph.errors import RuntimeUnavailableError

PRESETS = ("cheems-tiny", "cheems-tiny-moe", "cheems-2407-tiny", "llama-tiny", "mamba2-tiny", "jamba-tiny")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FOLDER = "WM_CUDA_BUNDLES"  # names a folder of bundles that were made before; see `make`


def missing() -> str | None:
    """Why no session runs on a GPU here, with kernels and bodies, or None."""
    from wm_runtimes import availability
    from wm_runtimes.native_kernels import find_library

    if find_spec("torch") is None or find_spec("triton") is None:
        return "torch and triton are needed to export native kernels"
    if reason := availability("onnxruntime-cuda"):
        return reason
    try:
        find_library("libwm_kernels_onnxruntime.so")
    except RuntimeUnavailableError as error:
        return str(error)
    return None


def export(folder: Path, preset: str, dtype: str, capability: int, processes: int | None = None) -> Path:
    """Export a preset with random parameters, where that was not done before; `capability` 90 is for sm_90."""
    import wm_export.native as native
    from wm_export import export_bundle
    from wm_graph import ModelConfig, init_params, save_checkpoint

    bundle = folder / f"{preset}-{dtype}"
    if (bundle / "manifest.json").exists():
        return bundle
    cfg = ModelConfig.preset(preset)
    compile_kernels = native.compile_kernels
    native.compile_kernels = lambda kernels, given, tell: compile_kernels(kernels, given or processes, tell)
    try:
        with TemporaryDirectory() as scratch:
            save_checkpoint(Path(scratch) / "checkpoint", cfg, init_params(cfg, seed=1))
            export_bundle(Path(scratch) / "checkpoint", bundle, targets=("onnx", "native"), dtype=dtype, architectures=(capability,))
    finally:
        native.compile_kernels = compile_kernels
    return bundle


def make(folder: Path, capability: int, workers: int) -> None:
    """Export all of them, several at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [pool.submit(export, folder, preset, dtype, capability, 2) for preset in PRESETS for dtype in DTYPES]
        for job in jobs:
            print(job.result().name, flush=True)


def bundle_of(root: Path, preset: str, dtype: str) -> Path:
    """The bundle made before, or a new one in `root`."""
    from wm_runtimes.cuda_device import cuda_device

    named = os.environ.get(FOLDER)
    if named and (Path(named) / f"{preset}-{dtype}" / "manifest.json").exists():
        return Path(named) / f"{preset}-{dtype}"
    device = cuda_device()
    return export(root, preset, dtype, 10 * device.major + device.minor)


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
