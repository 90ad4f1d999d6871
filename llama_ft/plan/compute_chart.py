"""The picture of a compute plan: loss against training compute, and what serving does to the best size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError
from llama_ft.plan.compute import MAIN, Point
from llama_ft.plan.compute_plan import ASKED, SERVED, Answer, Row
from llama_ft.plan.compute_runs import LLAMA, LLAMA_2, PUBLISHED
from llama_ft.plan.words import count

STEPS = 240
"""Points of a curve."""
SIZES = tuple(factor * 10.0**power for power in range(6, 15) for factor in (1, 3))
"""Parameters that may get a curve: two a decade."""
MARKS = {LLAMA: ("o", "tab:red"), LLAMA_2: ("^", "tab:purple")}
"""Of the published models: form and colour."""


def draw(found: Answer, path: Path) -> None:
    """Writes the chart as the ending of `path` says, making its folder. By the main fit.

    UserError where it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    served = bool(found.ask.served)
    figure, panels = plt.subplots(
        1, 1 + served, figsize=(15 if served else 8.5, 6), layout="constrained", squeeze=False
    )
    try:
        _losses(panels[0][0], found)
        if served:
            _lifetime(panels[0][1], found)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise UserError(what, where=str(path), key="--chart", hint="name a file in a folder of yours") from error
    finally:
        plt.close(figure)


def _losses(axes: Any, found: Answer) -> None:
    """Loss against FLOP: a curve per size, the least loss of any, Meta's models, and the rows of the answer."""
    points = [row.point for row in found.rows] + [one.point for one in PUBLISHED]
    low, high = min(p.compute for p in points) / 30, max(p.compute for p in points) * 10
    computes = _spread(low, high)
    best = [MAIN.loss(MAIN.for_compute(c)) for c in computes]
    top = max(best[0] + 0.15, *(row.loss[MAIN.name] + 0.05 for row in _own(found)))
    bottom = best[-1] - 0.02
    smallest, largest = (MAIN.for_compute(c).parameters for c in (low, high))
    sizes = [size for size in SIZES if smallest / 4 < size < largest / 1.5]
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for number, size in enumerate(sizes):
        line = [(c, MAIN.loss(Point(size, c / (6 * size)))) for c in computes]
        shown = [(c, loss) for c, loss in line if loss <= top]
        shade = colours(0.9 * number / max(1, len(sizes) - 1))
        axes.plot(*zip(*shown, strict=True), color=shade, linewidth=1.2, label=f"{count(size)} parameters")
    axes.plot(computes, best, "k--", linewidth=1.8, label="compute-optimal, any size")
    for family, (form, colour) in MARKS.items():
        _published(axes, family, form, colour)
    for row, form in zip(_own(found), ("*", "P"), strict=False):
        label = f"{row.law}: {count(row.point.parameters)} on {count(row.point.tokens)} tokens"
        style = {"color": "tab:orange", "markersize": 14, "markeredgecolor": "black", "zorder": 5}
        axes.plot(row.point.compute, row.loss[MAIN.name], form, label=label, **style)
    axes.set(xscale="log", xlim=(low, high), ylim=(bottom, top))
    axes.set(xlabel="training compute, FLOP (6ND)", ylabel="predicted loss, nats per token")
    axes.set_title(f"Loss against training compute\n{MAIN.source}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right", framealpha=1)


def _published(axes: Any, family: str, form: str, colour: str) -> None:
    models = [one for one in PUBLISHED if one.family == family]
    places = [(one.point.compute, MAIN.loss(one.point)) for one in models]
    label = f"{family}, trained on {count(models[0].tokens)}"
    if len({one.tokens for one in models}) > 1:
        label += f" and {count(models[-1].tokens)}"
    axes.plot(*zip(*places, strict=True), form, color=colour, markersize=7, zorder=4, label=f"{label} tokens")
    left = family == LLAMA
    for one, place in zip(models, places, strict=True):
        where = {"xytext": (-7, -10) if left else (7, 5), "ha": "right" if left else "left"}
        axes.annotate(one.size, place, textcoords="offset points", color=colour, fontsize=8, **where)


def _own(found: Answer) -> list[Row]:
    """The rows that get a star: what was asked, or the main fit's; and what it becomes when it is served."""
    laws = {row.law: row for row in found.rows}
    first = ASKED if ASKED in laws else MAIN.name
    return [laws[law] for law in (first, SERVED.format(MAIN.name)) if law in laws]


def _lifetime(axes: Any, found: Answer) -> None:
    """FLOP of training and serving against size, at the loss of the answer, for several amounts of serving."""
    served = found.ask.served
    assert served is not None
    first = _own(found)[0]
    loss = first.loss[MAIN.name]
    largest = max(MAIN.for_loss(loss).parameters * 4, first.point.parameters * 1.5)
    amounts = (0.0, served / 10, served, served * 10)
    smallest = MAIN.served(loss, served * 100).parameters
    sizes = _spread(smallest, largest)
    heights: list[float] = []
    for number, amount in enumerate(amounts):
        points = [(n, MAIN.tokens_for(loss, n)) for n in sizes]
        line = [(n, Point(n, d).lifetime(amount)) for n, d in points if d is not None]
        best = MAIN.served(loss, amount)
        name = "training alone" if not amount else f"and {count(amount)} tokens served"
        name += f": {count(best.parameters)}, {best.ratio:,.0f} tokens per parameter"
        drawn = axes.plot(*zip(*line, strict=True), color=f"C{number}", label=name)[0]
        lowest = best.lifetime(amount)
        heights.append(lowest)
        axes.plot(best.parameters, lowest, "o", color=drawn.get_color(), markersize=9)
    axes.set(xscale="log", yscale="log", xlim=(smallest, largest), ylim=(min(heights) / 1.6, max(heights) * 30))
    axes.set(xlabel="parameters", ylabel="FLOP over the model's life (6ND + 2N per served token)")
    axes.set_title(f"The same loss, {loss:.3f}, from models of any size\na dot is the cheapest", fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9, loc="upper right", framealpha=1)


def _spread(low: float, high: float) -> list[float]:
    """Numbers at equal ratios."""
    return [low * math.exp(math.log(high / low) * step / (STEPS - 1)) for step in range(STEPS)]
