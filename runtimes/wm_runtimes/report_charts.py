"""Numbers and charts of the parity page. Charts are inline SVG: no scripts, colours from the page's style, a title on every mark."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 46
_DASHES = ("", "", "8 3", "4 3", "9 3 2 3", "2 3")
_RARE = 5e-4  # a smaller share of values does not widen a histogram to the left


def digits(value: float) -> str:
    """Three significant digits: 1.05, 0.00123, 12300, 4.20e-8; NaN and ∞ by name."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    if 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".rstrip(".")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def breakable(name: str) -> Markup:
    """A dotted name that may go on in the next line behind a dot or underscore."""
    return Markup("<wbr>").join(re.split(r"(?<=[._])(?=[a-z])", name))


@dataclass(frozen=True)
class Axis:
    """A linear map of numbers, logarithms where they are wanted, to one side of a chart.

    Attributes:
        low: number at the start.
        high: number at the end.
        start: coordinate of `low`.
        end: coordinate of `high`.
    """

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of a number; what is outside is at the edge."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def key(name: str, place: int) -> Markup:
    """The swatch of a series in a legend, and its name."""
    line = Markup('<svg viewBox="0 0 28 10" aria-hidden="true"><path class="line s{}" d="M1 5H27" stroke-dasharray="{}"/></svg>')
    return line.format(place % len(_DASHES), _DASHES[place % len(_DASHES)]) + Markup("<span>{}</span>").format(name)


def growth_chart(steps: Sequence[int], series: Mapping[str, Sequence[float]], places: Mapping[str, int], label: str) -> Markup:
    """Error against decode step, both logarithmic.

    Args:
        steps: decode steps.
        series: name -> error after each step; zero is drawn at the bottom, NaN not at all.
        places: name -> its number among the page's series.
        label: what the chart shows, for readers who do not see it.
    """
    sizes = [math.log10(value) for values in series.values() for value in values if value > 0 and math.isfinite(value)] or [0.0]
    low, high = math.floor(min(sizes) - 0.1), math.ceil(max(sizes) + 0.1)
    across = Axis(0.0, math.log2(steps[-1]), _LEFT + 8, WIDTH - _RIGHT - 10)
    up = Axis(low, high, HEIGHT - _BOTTOM, _TOP)
    every = -(-(high - low) // 6)
    marks = [(float(power), f"1e{power}") for power in range(low, high + 1, every)]
    if high - low <= 2:
        marks += [(power + math.log10(part), f"{part}e{power}") for power in range(low, high) for part in (2, 5)]
    parts = [_grid_up(up, marks), _grid_across(across, [(math.log2(step), str(step)) for step in steps])]
    for name, values in series.items():
        points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        places_of = [(across.at(math.log2(step)), up.at(math.log10(value) if value > 0 else low)) for step, value in points]
        parts.append(_line(places_of, places[name]))
        for (step, value), (x, y) in zip(points, places_of, strict=True):
            title = f"{name}, step {step}: rms error {digits(value)}"
            parts.append(
                Markup('<circle class="dot s{}" cx="{}" cy="{}" r="3.5"><title>{}</title></circle>').format(places[name], x, y, title)
            )
    return _svg(parts, label, "decode step", "rms error of the logits")


def spread_chart(
    edges: Sequence[float], series: Mapping[str, Sequence[float]], places: Mapping[str, int], u: float, label: str, small: bool = False
) -> Markup:
    """Histograms as steps: share of values against log10(|error| / scale).

    Args:
        edges: of the bins.
        series: name -> share of all values in each bin.
        places: name -> its number among the page's series.
        u: unit roundoff, marked by a line.
        label: what the chart shows, for readers who do not see it.
        small: without axis titles, for many side by side.
    """
    used = [index for shares in series.values() for index, share in enumerate(shares) if share > _RARE] or [0]
    last = max((index for shares in series.values() for index, share in enumerate(shares) if share > 0), default=0)
    low, high = math.floor(edges[min(used)]), math.ceil(edges[last + 1])
    most = max((max(shares) for shares in series.values()), default=0.0)
    tick = next((one for one in (0.02, 0.05, 0.1) if 4 * one >= most), 0.25)
    ticks = [tick * part for part in range(max(1, math.ceil(most / tick)) + 1)]
    across, up = Axis(low, high, _LEFT, WIDTH - _RIGHT), Axis(0.0, ticks[-1], HEIGHT - _BOTTOM, _TOP)
    every = -(-(high - low) // (4 if small else 8))
    parts = [
        _grid_up(up, [(share, f"{100 * share:.0f}%") for share in ticks]),
        _grid_across(across, [(power, f"1e{power}") for power in range(low, high + 1, every)]),
    ]
    if low <= math.log10(u) <= high:
        x = across.at(math.log10(u))
        parts.append(Markup('<path class="mark" d="M{} {}V{}"><title>u = {}</title></path>').format(x, _TOP, HEIGHT - _BOTTOM, digits(u)))
        parts.append(Markup('<text class="tick" x="{}" y="{}">u</text>').format(x + 4, _TOP + 10))
    for name, shares in series.items():
        pairs = [(edge, share) for index, share in enumerate(shares) for edge in edges[index : index + 2] if low <= edge <= high]
        corners = [(across.at(edge), up.at(share)) for edge, share in pairs]
        peak = max(range(len(shares)), key=lambda index: shares[index])
        title = f"{name}: most errors, {digits(100 * shares[peak])} %, are 1e{edges[peak]:g} to 1e{edges[peak + 1]:g} of the scale"
        parts.append(_line(corners, places[name], title))
    return _svg(parts, label, *(("", "") if small else ("|error| / scale", "share of values")))


def _line(points: Sequence[tuple[float, float]], place: int, title: str = "") -> Markup:
    if not points:
        return Markup("")
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    found = Markup('<path class="line s{}" d="{}" stroke-dasharray="{}">').format(place, path, _DASHES[place % len(_DASHES)])
    return found + Markup("<title>{}</title></path>").format(title) if title else found + Markup("</path>")


def _grid_up(up: Axis, marks: Sequence[tuple[float, str]]) -> Markup:
    form = Markup('<path class="grid" d="M{} {}H{}"/><text class="tick end" x="{}" y="{}">{}</text>')
    return Markup("").join(form.format(_LEFT, up.at(at), WIDTH - _RIGHT, _LEFT - 6, up.at(at) + 4, text) for at, text in marks)


def _grid_across(across: Axis, marks: Sequence[tuple[float, str]]) -> Markup:
    form = Markup('<path class="grid" d="M{} {}V{}"/><text class="tick middle" x="{}" y="{}">{}</text>')
    bottom = HEIGHT - _BOTTOM
    return Markup("").join(form.format(across.at(at), _TOP, bottom, across.at(at), bottom + 18, text) for at, text in marks)


def _svg(parts: Sequence[Markup], label: str, across: str, up: str) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    titles = Markup('<text class="axis middle" x="{}" y="{}">{}</text>').format((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, across)
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    titles += Markup('<text class="axis middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(middle, up)
    return head + Markup("").join(parts) + titles + Markup("</svg>")
