"""Curves of several runs over each other, as inline SVG in the frame of a run's report (llama_ft/train/page/curves.py).

A line's colour and dashes are attributes, not style: the page's policy allows no style but the report's own, and these
colours are read on light and on dark paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ft.data.page.tokens import safe
from llama_ft.train.page.curves import (
    HEIGHT,
    ROWS,
    SHOWN,
    WIDTH,
    Curve,
    Series,
    axis,
    smoothed,
    step_ticks,
    thinned,
)
from llama_ft.train.page.html import table

COLOURS = ("#2f9a72", "#d0662b", "#3f7fd1", "#b14fc0", "#a8892a", "#d14a6b", "#3aa0b5", "#7d8590")
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""With the colours 32 lines that differ, which is more than there are letters."""
SMOOTHED_FROM = 5
"""Values from which on a mean of neighbours is one."""
DOTS = 60
"""Most values that have a dot each."""


@dataclass(frozen=True)
class Line:
    """One run's values in a figure. place: of the run among all, which its colour follows in every figure."""

    letter: str
    place: int
    values: Series

    @property
    def stroke(self) -> str:
        """Its colour and dashes, as attributes."""
        dashes = DASHES[self.place // len(COLOURS) % len(DASHES)]
        return f'stroke="{COLOURS[self.place % len(COLOURS)]}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def lines_html(kind: Curve, lines: Sequence[Line]) -> str:
    """A figure; nothing where no run has a finite value. `kind` says name, unit and axis; its own values are unused.

    Where `kind.smooth` is set, a line of SMOOTHED_FROM values or more is their centred mean, which the name then says;
    else every value has a dot, as long as dots can be told apart.
    """
    found = [Line(one.letter, one.place, [pair for pair in one.values if math.isfinite(pair[1])]) for one in lines]
    found = [line for line in found if line.values]
    if not found:
        return ""
    drawn = {line.letter: _drawn(kind, line.values) for line in found}
    values = [value for series in drawn.values() for _, value in series]
    steps = sorted({step for line in found for step, _ in line.values})
    ticks = axis(min(values), max(values), from_zero=kind.from_zero)
    first, last = steps[0], steps[-1]
    x = lambda step: 0.5 if first == last else (step - first) / (last - first)  # noqa: E731
    y = lambda value: HEIGHT * (1 - (value - ticks[0]) / (ticks[-1] - ticks[0]))  # noqa: E731

    paths = [f'<path class="rule" d="M0 {HEIGHT * i / (len(ticks) - 1):.1f}h{WIDTH}"/>' for i in range(len(ticks))]
    for line in found:
        places = [f"{x(step) * WIDTH:.1f} {y(value):.1f}" for step, value in drawn[line.letter]]
        if len(places) > 1:
            paths.append(f'<path {line.stroke} stroke-width="2" d="M{"L".join(places)}"/>')
        if len(places) == 1 or (not kind.smooth and len(places) <= DOTS):
            # A stroke without length and with round ends is a dot that stretching leaves round.
            dots = "".join(f"M{place}h0" for place in places)
            paths.append(f'<path stroke="{_colour(line)}" stroke-width="7" stroke-linecap="round" d="{dots}"/>')
    scale = "".join(f"<span>{_tick(value, ticks, kind)}</span>" for value in reversed(ticks))
    marks = "".join(
        f'<text x="{100 * x(step):.2f}%" y="14" text-anchor="{_anchor(x(step))}">{step:,}</text>'
        for step in step_ticks(first, last)
    )
    words = "; ".join(
        f"{line.letter} {kind.said(line.values[-1][1])} at {kind.by} {line.values[-1][0]:,}" for line in found
    )
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path {line.stroke} stroke-width="2" d="M0 4h24"/></svg>'
        f"{line.letter}</li>"
        for line in found
    )
    told = _data(kind, found, steps)
    means = kind.smooth and any(len(line.values) >= SMOOTHED_FROM for line in found)
    name = f"{kind.name}, smoothed" if means else kind.name
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true"'
    return (
        f'<figure class="curve{" large" if kind.large else ""}" data-by="{kind.by}" data-points="{told}">'
        f"<figcaption><strong>{name}</strong> <span>{words}.</span>"
        f'<ul class="keys">{keys}</ul></figcaption>'
        f'<div class="chart"><div class="scale" aria-hidden="true">{scale}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{name} by {kind.by}. {words}.">'
        f"<svg {box}>{''.join(paths)}</svg></div>"
        f'<svg class="steps" aria-hidden="true">{marks}</svg></div>{_values(kind, found, steps)}</figure>'
    )


def _drawn(kind: Curve, series: Series) -> Series:
    """The points of a line; few enough values are drawn as they are."""
    return smoothed(series) if kind.smooth and len(series) >= SMOOTHED_FROM else thinned(series)


def _colour(line: Line) -> str:
    return COLOURS[line.place % len(COLOURS)]


def _tick(value: float, ticks: Sequence[float], kind: Curve) -> str:
    step = ticks[1] - ticks[0]
    if kind.percent:
        return f"{value:.{0 if step >= 0.01 else 1}%}"
    most = max(map(abs, ticks))
    if most < 1e-2 or most >= 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    return f"{value:,.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"


def _anchor(share: float) -> str:
    return "start" if share < 0.04 else "end" if share > 0.96 else "middle"


def _at(kind: Curve, lines: Sequence[Line], step: int) -> list[str]:
    """What each run says at a step."""
    found = []
    for line in lines:
        exact = dict(line.values)
        found.append(kind.said(exact[step]) if step in exact else "–")
    return found


def _chosen(steps: Sequence[int], most: int) -> list[int]:
    stride = max(1, math.ceil(len(steps) / most))
    return sorted({*steps[::stride], steps[-1]})


def _data(kind: Curve, lines: Sequence[Line], steps: Sequence[int]) -> str:
    """[[step, what is said of it], …] as an attribute, for the readout under the pointer."""
    exact = [(line.letter, dict(line.values)) for line in lines]
    rows = [
        [step, " · ".join(f"{letter} {kind.said(values[step])}" for letter, values in exact if step in values)]
        for step in _chosen(steps, SHOWN)
    ]
    return safe(json.dumps(rows, separators=(",", ":"), ensure_ascii=False))


def _values(kind: Curve, lines: Sequence[Line], steps: Sequence[int]) -> str:
    chosen = _chosen(steps, ROWS)
    some = "" if len(chosen) == len(steps) else f" of {len(chosen)} of {len(steps):,} {kind.by}s"
    rows = [[f"{step:,}", *_at(kind, lines, step)] for step in chosen]
    shown = table(kind.name, [kind.by, *(line.letter for line in lines)], rows)
    return f"<details><summary>Values{some}</summary>{shown}</details>"
