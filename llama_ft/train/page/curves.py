"""Curves as inline SVG that any width stretches without its letters: paths in a box of their own, labels in percent.

Without a script the page shows the curves and, folded, a table of their values; page.js adds a readout under the
pointer from the same values, which stand in `data-points`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_ft.data.page.tokens import plural
from llama_ft.train.page.html import loss, number, table

Series = list[tuple[int, float]]
NATS = " nats"

SHOWN = 400
"""Points drawn of a curve; a longer one is drawn as the lowest and highest of as many stretches."""
ROWS = 20
"""Rows of the table of values."""
SMOOTHED = 20
"""The smooth line is the mean of this part of the run around each step, and of at least five steps."""
WIDTH, HEIGHT = 1000, 400
"""Units of the box that paths are drawn in; it is stretched to the figure's size."""


@dataclass
class Curve:
    """One figure: a line, and points of another measure on the same axes. `unit` follows the values in the readout.

    name: HTML. paired: the points are a second line, drawn as the first, whose own name is `line_name`. by: what the
    axis counts. errors: standard errors of values of the line, drawn as bars.
    """

    name: str
    line: Series
    unit: str = ""
    points: Series = field(default_factory=list)
    points_name: str = ""
    smooth: bool = False
    from_zero: bool = False
    percent: bool = False
    large: bool = False
    paired: bool = False
    line_name: str = "training"
    by: str = "step"
    errors: Series = field(default_factory=list)

    def said(self, value: float) -> str:
        """A value as the page writes it."""
        if self.unit == NATS:
            return f"{loss(value)}{self.unit}"
        return f"{value:.1%}" if self.percent else f"{number(value)}{self.unit}"

    def said_at(self, step: int, value: float) -> str:
        """A value of the line with its error, where that is known."""
        error = dict(self.errors).get(step, math.nan)
        return f"{self.said(value)} ± {self.said(error)}" if math.isfinite(error) else self.said(value)


def curve_html(curve: Curve) -> str:
    """A figure; nothing if there is no finite value to draw."""
    line = [(step, value) for step, value in curve.line if math.isfinite(value)]
    points = [(step, value) for step, value in curve.points if math.isfinite(value)]
    if not line and not points:
        return ""
    smooth = smoothed(line) if curve.smooth and len(line) >= 5 else []
    errors = {step: error for step, error in curve.errors if math.isfinite(error)}
    values = [value for _, value in [*line, *points]]
    values += [value + sign * errors[step] for step, value in line if step in errors for sign in (-1, 1)]
    ticks = axis(min(values), max(values), from_zero=curve.from_zero)
    low, high = ticks[0], ticks[-1]
    steps = [step for step, _ in [*line, *points]]
    first, last = min(steps), max(steps)
    x = lambda step: 0.5 if first == last else (step - first) / (last - first)  # noqa: E731
    place = lambda pair: (x(pair[0]) * WIDTH, HEIGHT * (1 - (pair[1] - low) / (high - low)))  # noqa: E731

    drawn = [f'<path class="rule" d="M0 {HEIGHT * i / (len(ticks) - 1):.1f}h{WIDTH}"/>' for i in range(len(ticks))]
    for step, value in line:
        if step in errors:
            (across, down), (_, up) = place((step, value - errors[step])), place((step, value + errors[step]))
            drawn.append(f'<path class="raw" d="M{across:.1f} {down:.1f}V{up:.1f}"/>')
    if not (curve.paired and smooth):
        drawn.append(_path("raw" if smooth else "line", map(place, thinned(line))))
    if smooth:
        drawn.append(_path("line", map(place, smooth)))
    if points and curve.paired:
        drawn.append(_path("held", map(place, smoothed(points) if smooth else thinned(points))))
    elif points:
        drawn.append(_path("held", map(place, points)))
        # A stroke without length and with round ends is a dot that stretching leaves round.
        dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in map(place, points))
        drawn.append(f'<path class="dots" d="{dots}"/>')
    scale = "".join(f"<span>{_tick(value, ticks, curve)}</span>" for value in reversed(ticks))
    marks = "".join(
        f'<text x="{100 * x(step):.2f}%" y="14" text-anchor="{_anchor(x(step))}">{step:,}</text>'
        for step in step_ticks(first, last)
    )
    lost = len(curve.line) + len(curve.points) - len(line) - len(points)
    missing = f' <span class="lost">{plural(lost, "value")} not finite.</span>' if lost else ""
    words = _in_words(curve, line, points)
    legend = _legend(curve, smooth=bool(smooth), points=bool(points))
    told = _data(curve, line, smooth, points)
    return (
        f'<figure class="curve{" large" if curve.large else ""}" data-by="{curve.by}" data-points="{told}">'
        f"<figcaption><strong>{curve.name}</strong> <span>{words}{missing}</span>{legend}</figcaption>"
        f'<div class="chart"><div class="scale" aria-hidden="true">{scale}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{curve.name} by {curve.by}. {words}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(drawn)}</svg></div>"
        f'<svg class="steps" aria-hidden="true">{marks}</svg></div>'
        f"{_values(curve, line, points)}</figure>"
    )


def smoothed(line: Series) -> Series:
    """The centred mean over 1/SMOOTHED of the points, at least five, fewer at the ends; thinned to SHOWN points."""
    half = max(2, len(line) // (2 * SMOOTHED))
    sums = [0.0]
    for _, value in line:
        sums.append(sums[-1] + value)
    stride = max(1, len(line) // SHOWN)
    found = []
    for i in sorted({*range(0, len(line), stride), len(line) - 1}):
        a, b = max(0, i - half), min(len(line), i + half + 1)
        found.append((line[i][0], (sums[b] - sums[a]) / (b - a)))
    return found


def thinned(line: Series) -> Series:
    """At most 2·SHOWN points that keep every peak: the lowest and the highest of each stretch, in their order."""
    if len(line) <= 2 * SHOWN:
        return line
    found: Series = []
    for i in range(SHOWN):
        part = line[i * len(line) // SHOWN : (i + 1) * len(line) // SHOWN]
        ends = {min(part, key=lambda pair: pair[1]), max(part, key=lambda pair: pair[1])}
        found += sorted(ends)
    return found


def axis(low: float, high: float, *, from_zero: bool = False) -> list[float]:
    """Four to seven evenly spaced round values that enclose low … high."""
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = (0.0, 2 * high) if high > 0 else (low - 1.0, high + 1.0)
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(
        size * power
        for size in (0.1, 0.2, 0.5, 1, 2, 5)
        if math.ceil(high / (size * power) - 1e-9) - math.floor(low / (size * power) + 1e-9) <= 6
    )
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, max(end, start + 1) + 1)]


def step_ticks(first: int, last: int) -> list[int]:
    """Up to six round steps between the first and the last."""
    size = next(base * 10**power for power in range(12) for base in (1, 2, 5) if base * 10**power * 5 >= last - first)
    return list(range(-(-first // size) * size, last + 1, size)) or [first]


def _anchor(share: float) -> str:
    return "start" if share < 0.04 else "end" if share > 0.96 else "middle"


def _tick(value: float, ticks: Sequence[float], curve: Curve) -> str:
    step = ticks[1] - ticks[0]
    if curve.percent:
        return f"{value:.{0 if step >= 0.01 else 1}%}"
    most = max(map(abs, ticks))
    if most < 1e-2 or most >= 1e6:  # all in one power of ten, as the eye compares them
        power = math.floor(math.log10(most) + 1e-9)
        return f"{round(value / 10.0**power, 6):g}e{power}" if round(value / step) else "0"
    return f"{value:,.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"


def _path(kind: str, places: object) -> str:
    steps = [f"{a:.1f} {b:.1f}" for a, b in places]  # type: ignore[attr-defined]
    return f'<path class="{kind}" d="M{"L".join(steps)}"/>' if len(steps) > 1 else _dot(kind, steps)


def _dot(kind: str, steps: list[str]) -> str:
    return f'<path class="{kind} single" d="M{steps[0]}h0"/>' if steps else ""


def _in_words(curve: Curve, line: Series, points: Series) -> str:
    def said(series: Series) -> str:
        (first, start), (last, end) = series[0], series[-1]
        if first == last:
            return f"{curve.said(end)} at {curve.by} {last:,}"
        return f"{curve.said(start)} at {curve.by} {first:,}, {curve.said(end)} at {curve.by} {last:,}"

    parts = [f"{curve.line_name} {said(line)}" if curve.paired else said(line)] if line else []
    if points:
        parts.append(f"{curve.points_name} {said(points)}")
    return "; ".join(parts) + "."


def _legend(curve: Curve, *, smooth: bool, points: bool) -> str:
    if curve.paired:
        how = ", smoothed" if smooth else ""
        items = [("line", f"{curve.line_name}{how}"), ("held", f"{curve.points_name}{how}")]
    else:
        items = [("raw", "each step"), ("line", "smoothed")] if smooth else []
    if points and not curve.paired:
        items += [] if smooth or not curve.line else [("line", "training")]
        items.append(("held", curve.points_name))
    if not items:
        return ""
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="{kind}" d="M0 4h24"/>'
        + ('<path class="dots" d="M12 4h0"/>' if kind == "held" and not curve.paired else "")
        + f"</svg>{name}</li>"
        for kind, name in items
    )
    return f'<ul class="keys">{keys}</ul>'


def _data(curve: Curve, line: Series, smooth: Series, points: Series) -> str:
    """[[step, what is said of it], …] as an attribute: at most SHOWN steps, and all that have a point of their own."""
    held, soft = dict(points), dict(smooth)
    stride = max(1, math.ceil(len(line) / SHOWN))
    also = set() if curve.paired and line else set(held)
    steps = sorted({step for step, _ in line[::stride]} | also | {line[-1][0]} if line else also)
    exact = dict(line)
    named = f"{curve.line_name} " if curve.paired else ""
    rows = []
    for step in steps:
        parts = [f"{named}{curve.said_at(step, exact[step])}"] if step in exact else []
        if step in soft and not curve.paired:
            parts.append(f"smoothed {curve.said(soft[step])}")
        if step in held:
            parts.append(f"{curve.points_name} {curve.said(held[step])}")
        rows.append([step, " · ".join(parts)])
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False).replace('"', "&quot;")


def _values(curve: Curve, line: Series, points: Series) -> str:
    exact, held = dict(line), dict(points)
    steps = sorted(exact.keys() | held.keys())
    stride = max(1, math.ceil(len(steps) / ROWS))
    chosen = sorted({*steps[::stride], steps[-1], *(list(held) if len(held) <= ROWS else [])})
    value = curve.line_name if curve.paired else "value"
    head = [curve.by, *([value] if exact else []), *([curve.points_name] if held else [])]
    rows = [
        [
            f"{step:,}",
            *([curve.said_at(step, exact[step]) if step in exact else "–"] if exact else []),
            *([curve.said(held[step]) if step in held else "–"] if held else []),
        ]
        for step in chosen
    ]
    some = "" if len(chosen) == len(steps) else f" of {len(chosen)} of {len(steps):,} steps"
    return f"<details><summary>Values{some}</summary>{table(curve.name, head, rows)}</details>"
