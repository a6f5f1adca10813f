"""Times of onnxruntime-cuda beside torch, in one process on one GPU: prompts, decode steps and memory.

    python benchmarks/cuda_runtimes.py [PRESET ...] [--dtype bf16] [--work FOLDER] [--profile] [--write]

A step is timed twice: with the way of the token to the GPU and of the logits back, as the caller of a session sees it, and on the device,
as a replayed CUDA graph. Its bound is what the bytes of its active weights and of the state that it reads take at the rate of a
copy. --write puts the tables into docs/performance.md; --profile prints the kernels of a step.
"""

import argparse
import gc
import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import _cuda_report
import torch
from _timing import machine, rates
from torch import Tensor

import wm_kernels
from wm_graph import ModelConfig, forward, init_params, save_checkpoint, zero_state
from wm_graph.params import Params, map_tensors, named_tensors
from wm_graph.shapes import state_leaves
from wm_graph.state import State, state_to_flat

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT, STEPS, ROOM = 4096, 64, 512
BATCHES = {1: PROMPT, 64: 256}  # rows -> tokens of their prompts
Measured = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["cheems-320m", "cheems-320m-moe"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cuda_runtimes", help="folder for bundles, which later runs find")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS, help="runtimes to measure")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a decode step")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks/results/cuda_runtimes.json", help="where the figures go, as they come in"
    )
    parser.add_argument("--write", action="store_true", help="write docs/performance.md too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("cuda_runtimes.py: no CUDA device on this machine; nothing was measured")
        return
    results: Measured = {"machine": machine(), "rates": rates(), "models": []}
    for preset in given.presets:
        found = {"preset": preset, "dtype": given.dtype, "rows": {}}
        results["models"].append(found)
        bundle = made(found, preset, given.dtype, given.work)
        for name in given.only:
            found["rows"][name] = row = tried(partial(ROWS[name], preset, given.dtype, bundle, given.profile))
            print(json.dumps({"preset": preset, "runtime": name, **row}), flush=True)
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(_cuda_report.render(results))
    if given.write:
        _cuda_report.write(results, ROOT / "docs" / "performance.md")


def made(found: Measured, preset: str, dtype: str, work: Path) -> Path:
    """The preset's bundle with kernels for this GPU, and how long it took to export; what a step of the model must read."""
    from wm_export import export_bundle

    cfg = ModelConfig.preset(preset)
    found["bounds"] = {str(batch): bound(cfg, DTYPES[dtype], batch, tokens) for batch, tokens in BATCHES.items()}
    bundle, checkpoint = work / f"{preset}-{dtype}", work / f"{preset}.checkpoint"
    if not (bundle / "manifest.json").exists():
        save_checkpoint(checkpoint, cfg, init_params(cfg, seed=0, dtype=DTYPES[dtype]))
        major, minor = torch.cuda.get_device_capability()
        begun = time.perf_counter()
        export_bundle(checkpoint, bundle, targets=("onnx", "native"), dtype=dtype, architectures=(10 * major + minor,))
        found["export_s"] = time.perf_counter() - begun
    return bundle


def bound(cfg: ModelConfig, dtype: torch.dtype, batch: int, position: int) -> Measured:
    """Bytes that a decode step must read: weights, of experts as many as its rows can choose, and states up to `position`."""
    with torch.device("meta"):
        params = init_params(cfg, dtype=dtype)
    weights = sum(active(cfg, name, value, batch, params.head is None) for name, value in named_tensors(params))
    with torch.device("meta"):
        state = state_to_flat(cfg, zero_state(cfg, batch, position, dtype, "meta"))
    return {"weight_bytes": weights, "state_bytes": sum(leaf.nbytes for leaf in state.values())}


def active(cfg: ModelConfig, name: str, value: Tensor, batch: int, tied: bool) -> int:
    """Bytes of a parameter that a step of `batch` tokens reads."""
    leaf = name.rsplit(".", 1)[-1]
    rows = len(value)
    if name == "embedding" and not tied:
        rows = min(rows, batch)
    elif leaf in ("expert_down", "expert_up"):
        rows = min(rows, batch * cfg.n_retrieval_head * cfg.n_pick)
    elif leaf in ("expert_in", "expert_out", "expert_in_bias", "expert_out_bias"):
        rows = min(rows, batch * cfg.n_pick)
    return value.nbytes // len(value) * rows


def tried(row: Callable[[], Measured]) -> Measured:
    """A runtime's figures, or why there are none."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    try:
        return row()
    except Exception as error:  # one runtime that fails must not hide the others
        return {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call until the GPU is done."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return median(times)


def used() -> int:
    """Bytes of the GPU's memory that are taken, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def session_row(kernels: bool, preset: str, dtype: str, folder: Path, profile: bool) -> Measured:
    """onnxruntime-cuda, with native kernels or bodies."""
    from wm_runtimes import open_bundle, open_session

    opened, row = open_bundle(folder), {}
    for batch, length in BATCHES.items() if kernels else ((1, PROMPT),):
        before = used()
        with open_session(opened, "onnxruntime-cuda", batch=batch, capacity=length + ROOM, kernels=kernels) as session:
            opened_bytes = used() - before
            tokens_BT = torch.randint(opened.limits.vocab_size, (batch, length)).numpy()

            def prefill(session: Any = session, tokens_BT: Any = tokens_BT) -> None:
                session.reset()
                session.prefill(tokens_BT)

            prefill()
            figures = {"prefill_s": seconds(prefill, 5)}
            if profile:
                print_kernels(prefill, f"{preset}, prompts of {batch} rows")
            token_B = tokens_BT[:, 0]
            session.decode(token_B)
            figures["step_s"] = seconds(lambda session=session, token_B=token_B: session.decode(token_B), STEPS)
            figures |= {"captured": session.steps.captured, "reason": session.steps.reason, "memory_bytes": used() - before}
            figures |= {"opened_bytes": opened_bytes, "weights_bytes": (folder / "model.safetensors").stat().st_size}
            if session.steps.captured:
                binding = next(one for one in session._buffers.bindings[session.runtime].values() if one.is_step)
                graph = next(graph for graph in binding.graphs.values() if graph)

                def replay(session: Any = session, binding: Any = binding, graph: str = graph) -> None:
                    session.steps._run(session._model, binding, graph)

                figures["graph_s"] = seconds(replay, STEPS)
                if profile:
                    print_kernels(replay, f"{preset}, steps of {batch} rows")
            row[str(batch)] = figures
    return row


def torch_row(how: str, preset: str, dtype: str, folder: Path, profile: bool) -> Measured:
    """`forward` as it is, on the references alone, or compiled."""
    cfg, row = ModelConfig.preset(preset), {}
    params = map_tensors(init_params(cfg, seed=0, dtype=DTYPES[dtype]), lambda _, value: value.cuda())
    with torch.no_grad(), torch.inference_mode(how != "compiled"), references() if how == "references" else nullcontext():
        for batch, length in BATCHES.items() if how == "eager" else ((1, PROMPT),):
            row[str(batch)] = torch_figures(cfg, params, how, batch, length, profile)
    return row


def torch_figures(cfg: ModelConfig, params: Params, how: str, batch: int, length: int, profile: bool) -> Measured:
    """A prompt and steps of torch, the state written in place."""
    state = zero_state(cfg, batch, length + ROOM, params.norm.dtype, "cuda")
    tokens_BT = torch.randint(cfg.vocab_size, (batch, length), device="cuda")
    token_B1, last_B1 = tokens_BT[:, :1].clone(), torch.full((batch, 1), length - 1, device="cuda")
    for value in (token_B1, *(value for part in (params, state) for _, value in named_tensors(part))):
        torch._dynamo.mark_static_address(value)

    def prompt(params: Params, tokens_BT: Tensor, state: State, select_BS: Tensor) -> Tensor:
        return forward(cfg, params, tokens_BT, state, None, select_BS, in_place=True)[0]

    def step(params: Params, token_B1: Tensor, state: State) -> Tensor:
        return forward(cfg, params, token_B1, state, in_place=True)[0]

    if how == "compiled":
        prompt = torch.compile(prompt, fullgraph=True)
        step = torch.compile(step, fullgraph=True, mode="reduce-overhead")

    leaves = [(leaf, spec.reset) for leaf, spec in zip(state_to_flat(cfg, state).values(), state_leaves(cfg), strict=True)]

    def prefill() -> None:
        for leaf, value in leaves:
            leaf.fill_(value)
        prompt(params, tokens_BT, state, last_B1)

    def decode() -> None:
        step(params, token_B1, state)

    prefill()
    figures = {"prefill_s": seconds(prefill, 5 if how != "references" else 2)}
    if profile:
        print_kernels(prefill, f"{how}, prompts of {batch} rows")
    for _ in range(4):  # compilation, and what records CUDA graphs
        decode()
    figures["graph_s" if how == "compiled" else "step_s"] = seconds(decode, STEPS)
    if profile:
        print_kernels(decode, f"{how}, steps of {batch} rows")
    return figures


@contextmanager
def references() -> Iterator[None]:
    """Ops are their references, on any device."""
    kept = {name: getattr(wm_kernels, name) for name in wm_kernels.__all__ if hasattr(getattr(wm_kernels, name), "_init_fn")}
    for name, op in kept.items():
        setattr(wm_kernels, name, op._init_fn)
    try:
        yield
    finally:
        for name, op in kept.items():
            setattr(wm_kernels, name, op)


def print_kernels(call: Callable[[], Any], what: str) -> None:
    """The kernels of a call by their time, in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    events = sorted((one for one in trace.key_averages() if one.self_device_time_total > 0), key=lambda one: -one.self_device_time_total)
    total = sum(one.self_device_time_total for one in events) / 10
    print(f"{what}: {total:.0f} us in {sum(one.count for one in events) / 10:.0f} kernels")
    for one in events[:40]:
        print(f"  {one.self_device_time_total / 10:8.1f} us  {one.count / 10:6.1f} x  {one.key[:110]}")


ROWS: dict[str, Callable[[str, str, Path, bool], Measured]] = {
    "onnxruntime-cuda:kernels": partial(session_row, True),
    "onnxruntime-cuda:bodies": partial(session_row, False),
    **{how: partial(torch_row, how) for how in ("compiled", "eager", "references")},
}

if __name__ == "__main__":
    main()
