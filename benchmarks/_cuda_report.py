"""Tables and bars of `benchmarks/cuda_runtimes.py`, between two marks of docs/performance.md."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- cuda runtimes: begin; written by benchmarks/cuda_runtimes.py -->", "<!-- cuda runtimes: end -->"
KERNELS, BODIES = "onnxruntime-cuda:kernels", "onnxruntime-cuda:bodies"
Measured = dict[str, Any]


def write(results: Measured, document: Path) -> None:
    """Replace what lies between the marks of the document."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def render(results: Measured) -> str:
    """Bars, then a table for each model."""
    machine, rate = results["machine"], results["rates"]["copy_bytes_s"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    head = f"{machine['date']}: {machine['device']}, {versions}. A copy moves {rate / 1e12:.2f} TB/s (read and written)."
    verdicts = [row for model in results["models"] for row in _verdicts(model, rate)]
    bars = _table(("bar", "measured", "limit", "met"), verdicts)
    return "\n\n".join([head, bars, *(_model(model, rate) for model in results["models"])])


def bars(model: Measured, rate: float) -> Iterator[tuple[str, float | None, float]]:
    """(what, value or None where it was not measured, what it must reach) of every bar of a model."""
    rows = model["rows"]

    def of(runtime: str, figure: str) -> float | None:
        value = rows.get(runtime, {}).get("1", {}).get(figure)
        return None if value is None else float(value)

    yield "prompt on kernels × compiled", _over(of("compiled", "prefill_s"), of(KERNELS, "prefill_s")), 0.9
    yield "prompt on bodies × eager references", _over(of("references", "prefill_s"), of(BODIES, "prefill_s")), 0.5
    yield "step on bodies × eager references", _over(of("references", "step_s"), of(BODIES, "step_s")), 0.5
    yield "step on kernels × compiled", _over(of("compiled", "graph_s"), of(KERNELS, "graph_s")), 1.0
    yield "step on kernels, share of its bound", _over(bound_seconds(model, 1, rate), of(KERNELS, "graph_s")), 0.45
    yield "weights ÷ memory of an open session", _over(of(KERNELS, "weights_bytes"), of(KERNELS, "opened_bytes")), 0.5


def bound_seconds(model: Measured, batch: int, rate: float) -> float:
    """The least time of a step: what it must read at the rate of a copy."""
    found = model["bounds"][str(batch)]
    return float(found["weight_bytes"] + found["state_bytes"]) / rate


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _verdicts(model: Measured, rate: float) -> Iterator[tuple[str, str, str, str]]:
    for what, value, least in bars(model, rate):
        met = "–" if value is None else "yes" if value >= least else "**no**"
        yield f"{model['preset']}: {what}", "not measured" if value is None else f"{value:.3g}", f"≥ {least:g}", met


def _model(model: Measured, rate: float) -> str:
    lines = [f"{model['preset']}, {model['dtype']}"]
    if "export_s" in model:
        lines[0] += f"; exported with its kernels in {model['export_s']:.0f} s"
    for batch, found in model["bounds"].items():
        total = (found["weight_bytes"] + found["state_bytes"]) / 1e6
        least = 1e6 * bound_seconds(model, int(batch), rate)
        lines.append(f"* A step of {batch} rows reads {total:.0f} MB, which takes a copy {least:.0f} µs.")
    header = ("runtime", "rows", "prompt, ms", "step, µs", "step in a graph, µs", "memory, MB")
    rows = [
        (name, batch, *(_number(figures, key, scale) for key, scale in COLUMNS))
        for name, by_batch in model["rows"].items()
        for batch, figures in by_batch.items()
        if isinstance(figures, dict)
    ]
    reasons = [f"* {name}: {found['reason']}" for name, found in model["rows"].items() if "reason" in found]
    return "\n".join([*lines[:1], "", *lines[1:], *reasons, "", _table(header, rows)])


COLUMNS = (("prefill_s", 1e3), ("step_s", 1e6), ("graph_s", 1e6), ("memory_bytes", 1e-6))


def _number(figures: Measured, key: str, scale: float) -> str:
    return f"{figures[key] * scale:.4g}" if key in figures else "–"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *rows))
