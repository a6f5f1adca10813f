"""Table, bars and plot of `benchmarks/kernels.py`, between two marks of docs/performance.md and in docs/kernels.svg.

    python benchmarks/_kernels_report.py RUN.json RUN.json ...

writes them from several runs, each of some cases: a case's last row counts, unless an earlier one has more peers, or as many and more of
our designs.

One clock for each kind of ratio. What the device does, which is rates of bytes and FLOP, a case beside another case of ours and a design
beside other designs of ours, goes by the device's time: that in a graph, or from Python where a call is too long for the host to show.
A peer beside ours goes by the time from Python, of both.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from math import log10
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- kernels: begin; written by benchmarks/kernels.py -->", "<!-- kernels: end -->"
Measured = dict[str, Any]
DESIGNS = "× the fastest of our designs"


def write(results: Measured, docs: Path) -> None:
    """Replace what lies between the marks, or add them at the end; draw the plot."""
    document = docs / "performance.md"
    text = document.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    before = before if found else f"{text.rstrip()}\n\n## CUDA kernels\n\n![Peers' times over ours](kernels.svg)\n\n"
    document.write_text(f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{after or chr(10)}", encoding="utf-8")
    (docs / "kernels.svg").write_text(plot(results), encoding="utf-8")


def join(runs: Sequence[Measured]) -> Measured:
    """One table from several runs; what a row is compared with is always of its own run."""
    cases: dict[tuple[str, str, str], Measured] = {}
    for number, run in enumerate(runs, 1):
        for found in run["cases"]:
            key = found["op"], found["case"], found["dtype"]
            beside = {text: other for text in found["bars"] if (other := _other(run, found, text))}
            new = found | {"run": number, "rates": run["rates"]} | ({"beside": beside} if beside else {})
            if key not in cases or _timed(new) >= _timed(cases[key]):
                cases[key] = new
    ordered = sorted(cases.values(), key=lambda found: (found["op"], found["run"]))
    return {**runs[-1], "runs": [{"machine": run["machine"], "rates": run["rates"]} for run in runs], "cases": ordered}


def split(results: Measured) -> list[Measured]:
    """The runs that were joined, or the only one."""
    if "runs" not in results:
        return [results]
    cases = results["cases"]
    return [run | {"cases": [found for found in cases if found["run"] == number]} for number, run in enumerate(results["runs"], 1)]


def _timed(found: Measured) -> tuple[int, int]:
    """How many peers and how many other designs of ours ran beside it."""
    peers, designs = (sum("us" in row for row in found.get(kind, {}).values()) for kind in ("peers", "designs"))
    return peers, designs


def device_us(row: Measured) -> float:
    """What a call takes on the device."""
    return row.get("graph_us") or row["us"]


def _clock(row: Measured) -> str:
    return "graph" if row.get("graph_us") else "Python"


def _other(results: Measured, found: Measured, text: str) -> Measured | None:
    """Our times in the case that a bar `time ÷ CASE` names, in the same run."""
    if text in found.get("beside", {}):
        return found["beside"][text]
    key = (found["op"], text.removeprefix("time ÷ "), found["dtype"])
    return next((row["ours"] for row in results["cases"] if (row["op"], row["case"], row["dtype"]) == key and "ours" in row), None)


def line(found: Measured, rates: Measured) -> str:
    """One case as a line of text."""
    head = f"{found['op']} {found['case']} {found['dtype']}"
    if "ours" not in found:
        return f"{head}: WRONG, {found.get('reason') or format(found['error'], '.3g') + ' times its budget'}"
    ours = found["ours"]["us"]
    parts = [f"{name} {_over(row, ours)}" for name, row in found["peers"].items()]
    graph = f", {found['ours']['graph_us']:.1f} in a graph" if found["ours"].get("graph_us") else ""
    return f"{head}: {ours:.1f} us{graph}, {_share(found, rates)}; " + "; ".join(parts)


def _over(row: Measured, ours: float) -> str:
    return f"{row['us']:.1f} us = {row['us'] / ours:.2f} ×" if "us" in row else row["reason"]


def _share(found: Measured, rates: Measured) -> str:
    """Achieved bytes/s and FLOP/s over what the card does at best."""
    seconds, rates = device_us(found["ours"]) * 1e-6, found.get("rates", rates)
    moved, done = found["bytes"] / seconds, found["flops"] / seconds
    return f"{moved / 1e12:.2f} TB/s ({moved / rates['copy_bytes_s']:.0%}), {done / 1e12:.1f} TFLOP/s ({done / rates['matmul_flop_s']:.0%})"


def render(results: Measured) -> str:
    """Machine, table of cases, bars, peers that cannot run, as markdown."""
    runs = results.get("runs", [results])
    head = "\n".join(f"{f'{number}. ' if len(runs) > 1 else ''}{_setting(run)}" for number, run in enumerate(runs, 1))
    return "\n\n".join([head, _cases(results), *_designs(results), _bars(results), *_reasons(results)])


def _setting(run: Measured) -> str:
    machine, rates = run["machine"], run["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = f"{machine['date']}: {machine['device']}, {versions}. A copy moves {rates['copy_bytes_s'] / 1e12:.2f} TB/s (read and written), "
    return head + f"an 8192³ bf16 product does {rates['matmul_flop_s'] / 1e12:.0f} TFLOP/s."


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    first, *rest = rows
    lines = [first, ("---", *("---:" for _ in first[1:])), *rest]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cases(results: Measured) -> str:
    rows = [("op, case, dtype", "µs", "in a graph", "launches", "extra MB", "achieved", "peers: µs (× ours)")]
    for found in results["cases"]:
        name = f"{found['op']}, {found['case']}, {found['dtype']}" + (f" (run {found['run']})" if "run" in found else "")
        if "ours" not in found:
            rows.append((name, "wrong", *("–",) * 6))
            continue
        ours = found["ours"]
        peers = "<br>".join(f"{key} {row['us']:.0f} ({row['us'] / ours['us']:.2f})" for key, row in found["peers"].items() if "us" in row)
        graph = f"{ours['graph_us']:.1f}" if ours.get("graph_us") else "–"
        figures = (f"{ours['us']:.1f}", graph, str(found["launches"]), f"{ours['extra_bytes'] / 1e6:.1f}")
        rows.append((name, *figures, _share(found, results["rates"]), peers or "–"))
    return _table(rows)


def bar(results: Measured, found: Measured, text: str) -> tuple[float | None, str]:
    """(what was measured, ≥ or ≤) of one of a case's bars; None where it was not measured."""
    ours, peers = found.get("ours"), found.get("peers", {})
    if ours is None:
        return None, "≥"
    if text == DESIGNS:
        times = [device_us(row) for row in found.get("designs", {}).values()]
        return (min(times) / device_us(ours) if times else None), "≥"
    if text.startswith("× "):
        times = [peers.get(name, {}).get("us") for name in text[2:].split(" + ")]
        return (None if None in times else sum(times) / ours["us"]), "≥"
    if text in ("copy rate", "matmul rate"):
        key, limit = ("bytes", "copy_bytes_s") if text == "copy rate" else ("flops", "matmul_flop_s")
        return found[key] / (device_us(ours) * 1e-6) / found.get("rates", results["rates"])[limit], "≥"
    if text.startswith("memory ÷ "):
        other = peers.get(text.removeprefix("memory ÷ "), {}).get("extra_bytes")
        return (ours["extra_bytes"] / other if other else None), "≤"
    if text.startswith("time ÷ "):
        other = _other(results, found, text)
        return (device_us(ours) / device_us(other) if other else None), "≤"
    if text == "launches":
        return found["launches"], "≤"
    raise ValueError(f"{found['op']} {found['case']}: no bar is called {text!r}")


def clock(results: Measured, found: Measured, text: str) -> str:
    """By which clock a bar is judged; of two times by which each, where they differ."""
    if "ours" not in found or text.startswith(("memory ÷", "launches")):
        return "–"
    rows = [found["ours"]]
    if text == DESIGNS:
        rows += sorted(found.get("designs", {}).values(), key=device_us)[:1]
    elif text.startswith("time ÷ "):
        rows += [other for other in [_other(results, found, text)] if other]
    elif text.startswith("× "):
        return "Python"
    return " ÷ ".join(dict.fromkeys(map(_clock, rows)))


def _bars(results: Measured) -> str:
    rows = [("bar", "measured", "by", "limit", "met")]
    for found in results["cases"]:
        for text, limit in found["bars"].items():
            value, sign = bar(results, found, text)
            met = value is not None and (value >= limit if sign == "≥" else value <= limit)
            shown, verdict = ("not measured", "–") if value is None else (f"{value:.3g}", "yes" if met else "**no**")
            name, by = f"{found['op']}, {found['case']}: {text}", "–" if value is None else clock(results, found, text)
            rows.append((name, shown, by, f"{sign} {limit:g}", verdict))
    return _table(rows)


def _designs(results: Measured) -> Iterable[str]:
    """What calls take in other designs of ours, on the device."""
    measured = [found for found in results["cases"] if found.get("designs")]
    names = sorted({name for found in measured for name in found["designs"]})
    rows = [("op, case, dtype", "ours: µs", *(f"{name} (÷ ours)" for name in names))]
    for found in measured:
        ours = device_us(found["ours"])
        times = {name: device_us(row) for name, row in found["designs"].items()}
        cells = (f"{times[name]:.1f} ({times[name] / ours:.2f})" if name in times else "–" for name in names)
        rows.append((f"{found['op']}, {found['case']}, {found['dtype']}", f"{ours:.1f}", *cells))
    if measured:
        yield "Calls in our other designs, whose results are checked alike, by the device's time:\n\n" + _table(rows)


def _reasons(results: Measured) -> Iterable[str]:
    reasons = {
        f"{name} ({found['op']}): {row['reason']}"
        for found in results["cases"]
        for name, row in found.get("peers", {}).items()
        if "reason" in row
    }
    if reasons:
        yield "Peers that could not run:\n\n" + "\n".join(f"* {reason}" for reason in sorted(reasons))


def plot(results: Measured) -> str:
    """Peers' times over ours, a group of bars for each case, on a logarithmic axis, as SVG."""
    groups = [
        (f"{found['op']} {found['case']}", [(name, row["us"] / found["ours"]["us"]) for name, row in found["peers"].items() if "us" in row])
        for found in results["cases"]
        if "ours" in found
    ]
    groups = [(label, bars) for label, bars in groups if bars]
    names = sorted({name for _, bars in groups for name, _ in bars})
    # Hues by the golden angle, in four shades: apart, however many peers there are.
    colour = {name: f"hsl({137.508 * i % 360:.0f},60%,{(30, 46, 60, 74)[i % 4]}%)" for i, name in enumerate(names)}
    ratios = [ratio for _, bars in groups for _, ratio in bars] or [1.0]
    low, high = min(-0.3, log10(min(ratios)) - 0.05), max(1.0, log10(max(ratios)))
    left, width, thick, gap, top = 230, 560, 10, 8, 40 + 16 * len(names)

    def across(ratio: float) -> float:
        return left + width * (log10(ratio) - low) / (high - low)

    parts, y = [], top
    for label, bars in groups:
        parts.append(f'<text x="{left - 8}" y="{y + thick * len(bars) / 2 + 4:.0f}" text-anchor="end">{escape(label)}</text>')
        for name, ratio in bars:
            start, end = sorted((across(1.0), across(ratio)))
            parts.append(f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 1):.1f}" height="{thick - 1}" fill="{colour[name]}"/>')
            parts.append(f'<text x="{end + 4:.1f}" y="{y + thick - 1}" font-size="9">{ratio:.2f}</text>')
            y += thick
        y += gap
    ticks = [value for value in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= log10(value) <= high]
    lines = [
        f'<line x1="{across(v):.1f}" x2="{across(v):.1f}" y1="{top - 6}" y2="{y}" stroke="{"#000" if v == 1 else "#ccc"}"/>' for v in ticks
    ]
    marks = [f'<text x="{across(v):.1f}" y="{top - 10}" text-anchor="middle">{v:g}</text>' for v in ticks]
    keys = [f'<rect x="{left}" y="{24 + 16 * i}" width="10" height="10" fill="{colour[name]}"/>' for i, name in enumerate(names)]
    keys += [f'<text x="{left + 16}" y="{33 + 16 * i}">{escape(name)}</text>' for i, name in enumerate(names)]
    title = '<text x="8" y="16" font-size="13">Time of a peer over ours (longer to the right is better)</text>'
    style = f'xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{y + 10}" font-family="sans-serif" font-size="11"'
    return (
        f"<svg {style}>\n"
        + "\n".join(['<rect width="100%" height="100%" fill="#fff"/>', title, *keys, *lines, *marks, *parts])
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    docs = Path(__file__).parents[1] / "docs"
    joined = join([run for name in sys.argv[1:] for run in split(json.loads(Path(name).read_text(encoding="utf-8")))])
    (docs.parent / "benchmarks/results/kernels.json").write_text(json.dumps(joined, indent=1), encoding="utf-8")
    write(joined, docs)
