"""The parity page: one HTML file with everything inside, from a report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from wm_graph.tolerances import FLOOR_ULPS, UNIT_ROUNDOFF
from wm_runtimes.error_growth import PROMPT
from wm_runtimes.op_parity import BINS, LOGITS, YARDSTICK, Distribution, OpRow, TapRow
from wm_runtimes.report import Report
from wm_runtimes.report_charts import breakable, digits, growth_chart, key, spread_chart

# R over its limit, at most -> the class of the cell's colour.
_LEVELS = ((0.25, "l0"), (0.5, "l1"), (0.75, "l2"), (1.0, "l3"))


@dataclass(frozen=True)
class Cell:
    """One number of the heat table: R, the ulps under it, which value is over where the op is not, the colour, what hovering says."""

    R: str
    ulps: str
    inside: str
    level: str
    over: bool
    title: str


def render_page(report: Report, command: str, when: str) -> str:
    """The page.

    Args:
        report: what was measured.
        command: what was typed.
        when: the time, in words.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"digits": digits, "breakable": breakable}
    template = environment.from_string(files("wm_runtimes").joinpath("report_page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        command=command,
        when=when,
        checks=_checks(report),
        columns=_columns(report),
        limits={(row.dtype, row.runtime): row.R_limit for row in report.ops},
        heat=_heat(report),
        parts=_parts(report),
        growth=_growth(report),
        spreads=_spreads(report),
        keys={name: key(name, place) for name, place in _places(report).items()},
        yardstick=YARDSTICK,
        prompt=PROMPT,
        floor=FLOOR_ULPS,
        u=UNIT_ROUNDOFF,
    )


def _places(report: Report) -> dict[str, int]:
    """Series -> its number, the same in every chart."""
    runtimes = dict.fromkeys(row.runtime for model in report.models for row in model.rows)
    return {name: place for place, name in enumerate((YARDSTICK, *runtimes))}


def _checks(report: Report) -> tuple[int, int]:
    """How many checks passed, and how many were made: whole models, every value of every op, long decodes."""
    rows = [row.passed for model in report.models for row in model.rows]
    values = [row.R_limit >= tap.R for row in report.ops for tap in row.taps]
    every = [*rows, *values, *(row.passed for row in report.growth)]
    return sum(every), len(every)


def _columns(report: Report) -> dict[str, list[str]]:
    """Dtype -> runtimes that ran it."""
    found: dict[str, list[str]] = {}
    for row in report.ops:
        if row.runtime not in found.setdefault(row.dtype, []):
            found[row.dtype].append(row.runtime)
    return found


def _heat(report: Report) -> dict[str, dict[tuple[str, str], Cell]]:
    """Op -> (dtype, runtime) -> cell; ops in the order in which they first run."""
    found: dict[str, dict[tuple[str, str], Cell]] = {}
    for row in report.ops:
        worst = max(row.taps, key=lambda tap: math.inf if math.isnan(tap.R) else tap.R)
        title = f"{row.op}, {row.dtype}, {row.runtime}: {row.values} values; largest R {digits(worst.R)} at {worst.name}"
        found.setdefault(row.op, {})[row.dtype, row.runtime] = _cell(
            row, row.R, row.ulps, not row.passed, title, worst if len(row.taps) > 1 and worst in row.over else None
        )
    return found


def _parts(report: Report) -> dict[str, dict[str, dict[tuple[str, str], Cell]]]:
    """Op -> value of a layer -> (dtype, runtime) -> cell."""
    found: dict[str, dict[str, dict[tuple[str, str], Cell]]] = {}
    for row in report.ops:
        for tap in row.taps:
            cell = _cell(row, tap.R, tap.ulps, tap in row.over, f"{tap.name}, {row.dtype}, {row.runtime}")
            found.setdefault(row.op, {}).setdefault(tap.name, {})[row.dtype, row.runtime] = cell
    return found


def _cell(row: OpRow, R: float, ulps: float, over: bool, title: str, tap_over: TapRow | None = None) -> Cell:
    level = next((name for most, name in _LEVELS if most * row.R_limit >= R), "over")
    inside = "" if tap_over is None else f"worst R {digits(tap_over.R)}"
    return Cell(digits(R), digits(ulps), inside, "over" if over else level, over, f"{title}; limit {digits(row.R_limit)}")


def _growth(report: Report) -> dict[str, dict[str, Any]]:
    """Dtype -> chart and rows."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(row.dtype for row in report.growth):
        rows = [row for row in report.growth if row.dtype == dtype]
        series = {row.runtime: row.rms for row in rows}
        label = f"rms error of the logits, {dtype}, after decode steps 1 to {rows[0].steps[-1]}"
        found[dtype] = {"chart": growth_chart(rows[0].steps, series, _places(report), label), "rows": rows}
    return found


def _spreads(report: Report) -> dict[str, dict[str, Markup]]:
    """Dtype -> op -> histogram; the logits first."""
    found: dict[str, dict[str, Markup]] = {}
    for dtype, runtimes in _columns(report).items():
        charts = {}
        for op in sorted(dict.fromkeys(row.op for row in report.ops if row.dtype == dtype), key=lambda op: op != LOGITS):
            rows = {row.runtime: row for row in report.ops if (row.dtype, row.op) == (dtype, op)}
            series = {name: _shares(rows[name].spread) for name in runtimes}
            charts[op] = spread_chart(
                BINS.tolist(), series, _places(report), UNIT_ROUNDOFF[dtype], f"errors of {op}, {dtype}", small=op != LOGITS
            )
        found[dtype] = charts
    return found


def _shares(spread: Distribution) -> Sequence[float]:
    total = sum(spread.counts) + spread.exact + spread.not_finite
    return [count / (total or 1) for count in spread.counts]
