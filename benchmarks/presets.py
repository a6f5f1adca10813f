"""Parity of every preset, in every runtime of this machine and both dtypes: `python benchmarks/presets.py` measures, writes docs/parity.md.

Each preset gets random parameters, none of them constant, and a window that the draws overflow; it is exported and measured by `wm`, in
processes of its own. The record is resumable: what is in `benchmarks/results/presets.json` is not measured again, unless it is named.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from wm_graph.presets import PRESETS
from wm_graph.shapes import count_parameters
from wm_graph.tolerances import UNIT_ROUNDOFF

ROOT = Path(__file__).parents[1]
WM = Path(sysconfig.get_path("scripts")) / "wm"
ON_GPU = ROOT / "benchmarks" / "results" / "cuda_parity.json"  # what benchmarks/cuda_parity.py measured
DTYPES = {"fp32": "float32", "fp16": "float16"}
# Rows of the draws by the number of parameters: every row of a large vocabulary is millions of logits, which R pools.
DRAWS = ((2e8, 64), (1e9, 8), (float("inf"), 4))
DRAWS_COMPILED = 16  # at most
SEED = 0
RUNTIMES = "eager,onnxruntime-cpu,onnxruntime-cpu:model.onnx"
COMPILING = 1800.0  # seconds that a compiled model may take, compilation and draws
WINDOW = 64  # keys kept: the presets keep 2048, more than any draw has
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("presets", nargs="*", help="presets to measure again; every one that is missing by default")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "presets", help="folder for checkpoints and bundles")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "presets.json")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "parity.md")
    options = parser.parse_args()
    if unknown := sorted(set(options.presets) - set(PRESETS)):
        parser.error(f"unknown preset {unknown[0]}; choose from {', '.join(PRESETS)}")
    found: dict[str, Row] = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in sorted(PRESETS, key=lambda name: count_parameters(PRESETS[name])):
        for dtype in options.dtypes:
            key = f"{name} {dtype}"
            if name in options.presets or (not options.presets and "rows" not in found.get(key, {})):
                found[key] = measure(name, dtype, options.work)
                print(key, summary(found[key]), flush=True)
                options.results.write_text(json.dumps(found, indent=1) + "\n")
                options.report.write_text(render(found, on_gpu()), encoding="utf-8")


def measure(name: str, dtype: str, work: Path) -> Row:
    """Initialise, export and measure one preset; the report of `wm parity --json`, or why there is none."""
    size = count_parameters(PRESETS[name])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    draws = next(count for most, count in DRAWS if size < most)
    try:
        wm("init", name, "-o", work / "checkpoint")
        enliven(work / "checkpoint")
        wm("export", work / "checkpoint", "-o", work / "bundle", "--dtype", dtype)
        shutil.rmtree(work / "checkpoint")
        report = parity(work / "bundle", RUNTIMES, draws)
        report["rows"] += _compiled(work / "bundle", min(draws, DRAWS_COMPILED))
        return report | provenance()
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def provenance() -> Row:
    """When an entry was measured, by which versions, from which seed."""
    versions = {name: version(name) for name in ("torch", "onnxruntime")} | {"python": platform.python_version()}
    return {"date": date.today().isoformat(), "versions": versions, "seed": SEED}


def enliven(checkpoint: Path) -> None:
    """Give what starts as a constant (norms, residual scales, biases, scores' A) random values, so that no mistake in its use is hidden."""
    file, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    generator = torch.Generator().manual_seed(0)

    def lively(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.min() < value.max():
            return value
        return value + (1.0 if name.endswith(".A") else 0.2) * torch.randn(value.shape, generator=generator).to(value.dtype)

    save_file({name: lively(name, value) for name, value in sorted(load_file(file).items())}, file)
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"keep_window": WINDOW}))


def _compiled(bundle: Path, draws: int) -> list[Row]:
    """The compiled runtime's row, or why there is none."""
    try:
        told = parity(bundle, "compiled", draws, COMPILING)
    except subprocess.TimeoutExpired:
        return [{"runtime": "compiled", "error": f"longer than {COMPILING / 60:g} minutes"}]
    except RuntimeError as error:
        return [{"runtime": "compiled", "error": str(error)}]
    return [row | {"draws": draws} for row in told["rows"]]


def parity(bundle: Path, runtimes: str, draws: int, seconds: float | None = None) -> Row:
    """The report of `wm parity`; numbers out of budget are an answer."""
    report: Row = json.loads(
        wm("parity", bundle, "--runtimes", runtimes, "--draws", draws, "--seed", SEED, "--json", fails=True, seconds=seconds)
    )
    return report


def wm(*words: object, fails: bool = False, seconds: float | None = None) -> str:
    """What a `wm` command prints; exit code 1, numbers out of budget, is an answer where `fails`."""
    done = subprocess.run([str(WM), *map(str, words)], capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode not in ((0, 1) if fails else (0,)):
        raise RuntimeError(f"wm {words[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1] if done.stderr else ''}")
    return done.stdout


def summary(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    return "; ".join(
        f"{one['runtime']} " + (one["error"] if "error" in one else f"R {one['R']:.3f} {'passed' if one['passed'] else 'FAILED'}")
        for one in row["rows"]
    )


def on_gpu() -> dict[str, Row]:
    """The record of benchmarks/cuda_parity.py, if there is one."""
    return json.loads(ON_GPU.read_text()) if ON_GPU.exists() else {}


def render(found: dict[str, Row], gpu: dict[str, Row]) -> str:
    """The document."""
    lines = [
        "# Parity of every preset\n",
        "Written by `python benchmarks/presets.py` from what `wm parity` measured; nothing is entered by hand. Random parameters, none of",
        f"them constant, a window of {WINDOW} keys, random prompts of 1 to 79 tokens and one of 271, half of them in two pieces, then 8",
        "decoded tokens, against the float64 oracle. The limits are those of [tolerances.md](tolerances.md). `onnxruntime-cpu` runs",
        "`model.ort.onnx`.\n",
        f"u of float32 is {UNIT_ROUNDOFF['float32']:.3g}, of float16 {UNIT_ROUNDOFF['float16']:.3g}.\n",
        "A differing choice is worse than the oracle's by at most the shortfall, a share of its score budget.\n",
        *_measured(found),
        *HEADER,
    ]
    for name, dtype in product(PRESETS, DTYPES):
        row = found.get(f"{name} {dtype}", {"error": "not yet"})
        rows = row.get("rows", [{"runtime": "–", "error": row.get("error")}])
        lines += [_line(f"`{name}`", DTYPES[dtype], one, row.get("draws", 0)) for one in rows]
    if gpu:
        lines += [
            "\n## On a GPU\n",
            "Written by `python benchmarks/cuda_parity.py`: the same on an H100, prompts of up to 79 tokens and one of 1000, then 256",
            "decoded tokens. `eager` and `compiled` are torch on the GPU, through our Triton kernels.\n",
            *HEADER,
        ]
    for key, row in gpu.items():
        name, dtype = key.split()
        rows = row.get("rows", [{"runtime": "–", "error": row.get("error")}])
        lines += [_line(f"`{name}`", {**DTYPES, "bf16": "bfloat16"}[dtype], one, row.get("draws", 0)) for one in rows]
    return "\n".join(lines) + "\n"


def _measured(found: dict[str, Row]) -> Iterator[str]:
    """How much was compared of how large a model, and where the entries come from."""
    tokens: dict[tuple[bool, int], set[int]] = {}
    for key, entry in found.items():
        for row in entry.get("rows", ()):
            if "error" not in row:
                size = (row["runtime"] == "compiled", row.get("draws", entry["draws"]))
                tokens.setdefault(size, set()).add(row["outputs"] // PRESETS[key.split()[0]].vocab_size)
    (_, all_draws), (_, some), (_, few) = DRAWS
    yield f"Of a bundle parity asks {all_draws} draws; here presets of 320 M parameters are measured with {some} and those of 1.3 G with"
    yield f"{few}, all prompts in one piece, and `compiled` with at most {DRAWS_COMPILED}. Compared tokens:"
    listed = [
        f"{draws} draws{' of `compiled`' if compiled else ''} are {' or '.join(map(str, sorted(counts)))}"
        for (compiled, draws), counts in sorted(tokens.items(), key=lambda one: (one[0][0], -one[0][1]))
    ]
    yield f"{', '.join(listed)}.\n"
    told = {json.dumps([entry[name] for name in ("date", "versions", "seed")]) for entry in found.values() if "date" in entry}
    for date_, versions, seed in map(json.loads, sorted(told)):
        names = ", ".join(f"{name} {number}" for name, number in versions.items())
        yield f"Measured on {date_} from seed {seed}: {names}.\n"
    if bare := sum("rows" in entry and "date" not in entry for entry in found.values()):
        yield f"Of {bare} of {len(found)} entries the record does not say when, from which seed and by which versions they were measured.\n"


HEADER = (
    "| preset | dtype | runtime | draws | R | limit | max abs | limit | choices differing | shortfall | verdict |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def _line(name: str, dtype: str, row: Row, draws: int) -> str:
    if "error" in row:
        return f"| {name} | {dtype} | {row['runtime']} | – | – | – | – | – | – | – | not measured: {row['error']} |"
    draws = row.get("draws", draws)
    cells = (
        name, row["dtype"], row["runtime"], str(draws), _number(row["R"], ".3f"), f"{row['R_limit']:g}",
        _number(row["max_abs"], ".2e"), f"{row['max_abs_limit']:.2e}", _number(row["choice_rate"], ".3%"),
        _number(row["choice_excess"], ".2f"), "passed" if row["passed"] else "**failed**",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


if __name__ == "__main__":
    main()
