"""Parity on a GPU: `python benchmarks/cuda_parity.py` measures eager, compiled and onnxruntime-cuda, then writes docs/parity.md.

Each model has random parameters, none of them constant, and a window that the draws overflow, as in benchmarks/presets.py. Prompts of up to
79 tokens and one of 1000 go on for 256 steps. The float64 oracle and the yardstick run on the CPU.
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import presets
import torch

from wm_graph import ModelConfig, forward, init_params, save_checkpoint, zero_state
from wm_graph.checkpoints import load_tensors
from wm_graph.params import Params, map_tensors, params_from_flat
from wm_graph.state import State
from wm_runtimes import open_bundle
from wm_runtimes.choice_names import selecting_calls
from wm_runtimes.draws import Array, Choices, Draws, Trace, make_draws, run_draws
from wm_runtimes.parity import Measurement
from wm_runtimes.tap_runners import RecordedOps

ROOT = Path(__file__).parents[1]
MODELS = ("cheems-20m", "cheems-20m-moe", "cheems-320m", "cheems-320m-moe", "llama-20m", "mamba2-20m")
DTYPES = ("fp16", "bf16")
IN_TORCH = ("eager", "compiled")
RUNTIMES = (*IN_TORCH, "onnxruntime-cuda:kernels", "onnxruntime-cuda:bodies")
ROWS, LONGEST, PROMPT, STEPS = 4, 79, 1000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--record", type=Path, default=presets.ON_GPU)
    parser.add_argument("--workers", type=int, default=4, help="models measured at once")
    parser.add_argument("--write", action="store_true", help="write docs/parity.md too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("cuda_parity.py: no CUDA device on this machine; nothing was measured")
        return
    found = json.loads(given.record.read_text()) if given.record.exists() else {}
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        jobs = {(model, dtype): pool.submit(measured, model, dtype, given.workers) for model in given.models for dtype in given.dtypes}
        for (model, dtype), job in jobs.items():
            found[f"{model} {dtype}"] = report = job.result()
            print(model, dtype, presets.summary(report), flush=True)
            given.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.write:
        record = json.loads((ROOT / "benchmarks" / "results" / "presets.json").read_text())
        (ROOT / "docs" / "parity.md").write_text(presets.render(record, found), encoding="utf-8")


def measured(model: str, dtype: str, workers: int) -> dict[str, Any]:
    """The report on one model, or why there is none."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    with tempfile.TemporaryDirectory() as work:
        try:
            return measure(model, dtype, Path(work))
        except Exception as error:  # one model that fails must not hide the others
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def measure(model: str, dtype: str, work: Path) -> dict[str, Any]:
    """Initialise, export with kernels for this GPU, run and compare."""
    from wm_export import export_bundle

    cfg = ModelConfig.preset(model)
    save_checkpoint(work / "checkpoint", cfg, init_params(cfg))
    presets.enliven(work / "checkpoint")
    major, minor = torch.cuda.get_device_capability()
    export_bundle(work / "checkpoint", work / "bundle", targets=("onnx", "native"), dtype=dtype, architectures=(10 * major + minor,))
    bundle = open_bundle(work / "bundle")
    groups = make_draws(bundle.limits.vocab_size, ROWS, 0, LONGEST, STEPS, PROMPT)
    params = params_from_flat(bundle.config, load_tensors(bundle.path))
    return OnGpu(bundle, params, groups, list(RUNTIMES), {}).run(lambda text, fraction: None).to_dict()


class OnGpu(Measurement):
    """Parity whose eager and compiled runs are on the GPU."""

    def trace(self, name: str, draws: Draws) -> Trace:
        """See `Measurement`."""
        if name not in IN_TORCH:
            return super().trace(name, draws)
        torch._dynamo.reset()
        runner = OnCuda(self.bundle.config, self.params, self.batch, self.capacity, name == "compiled")
        if not self.names:
            return run_draws(runner, draws)
        recorded = RecordedOps(runner, self.names, selecting_calls(self.bundle.config))
        with recorded.recording("CUDA"):
            return run_draws(recorded, draws)


class OnCuda:
    """`forward` on the GPU, in place, as a runner that tells no choices."""

    def __init__(self, cfg: ModelConfig, params: Params, batch: int, capacity: int, compiled: bool) -> None:
        self._cfg, self._size = cfg, (batch, capacity)
        self._params = map_tensors(params, lambda _, value: value.cuda())
        self._forward = torch.compile(forward, fullgraph=True, dynamic=True) if compiled else forward
        self._state: State | None = None

    def prefill(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        self._state = zero_state(self._cfg, *self._size, self._params.norm.dtype, "cuda")
        return self.extend(tokens_BT, valid_B, select_BS)

    def extend(self, tokens_BT: Array, valid_B: Array, select_BS: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        tokens, valid, select = (torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in (tokens_BT, valid_B, select_BS))
        with torch.no_grad():
            logits, self._state = self._forward(self._cfg, self._params, tokens, self._state, valid, select, in_place=True)
        return logits.cpu().numpy(), {}

    def decode(self, tokens_B: Array) -> tuple[Array, Choices]:
        """See `Runner`."""
        rows = len(tokens_B)
        logits_B1V, choices = self.extend(tokens_B[:, None], np.ones(rows, np.int64), np.zeros((rows, 1), np.int64))
        return logits_B1V[:, 0], choices


if __name__ == "__main__":
    main()
