"""The sources of a mixture as they were trained on: tokens, share, and the loss of each at the start and at the end."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from llama_ft.data.page.tokens import safe
from llama_ft.train.page.curves import NATS, Curve, curve_html
from llama_ft.train.page.gather import ReportView
from llama_ft.train.page.html import loss, section, table

FIRST_AND_LAST = 0.1
"""Share of the steps whose mean is the loss at the start, and at the end."""
LOSS, TOKENS, HELD_OUT = "loss_by_source", "tokens_by_source", "eval_loss_by_source"


def mixture(view: ReportView) -> str:
    """A table and a curve for each source; nothing of a run on one source."""
    tokens = {name: sum(value for _, value in points) for name, points in parts(view, TOKENS).items()}
    total = sum(tokens.values())
    if not total:
        return ""
    asked = shares_of(view)
    losses, held_out = parts(view, LOSS), parts(view, HELD_OUT)
    rows, drawn = [], ""
    for place, (name, count) in enumerate(tokens.items()):
        told = [value for _, value in losses.get(name, [])]
        some = max(1, round(FIRST_AND_LAST * len(told)))
        ends = (loss(fmean(told[:some])), loss(fmean(told[-some:]))) if told else ("–", "–")
        share = f"{asked[place]:.2%}" if place < len(asked) else "–"
        rows.append([safe(name), f"{count:,.0f}", f"{count / total:.2%}", share, *ends])
        drawn += curve_html(Curve(safe(name), losses.get(name, []), NATS, points=held_out.get(name, []), smooth=True))
    for name, points in held_out.items():
        drawn += "" if name in tokens else curve_html(Curve(f"{safe(name)}, held out", points, NATS))
    head = ["", "tokens", "share", "asked for", "loss, first tenth", "loss, last tenth"]
    about = "Loss in nats per labelled token of each source, as a mean over the first and the last tenth of the steps."
    body = table("Sources of the mixture", head, rows) + (drawn and f'<div class="curves">{drawn}</div>')
    return section("mixture", "Mixture", about, body)


def parts(view: ReportView, key: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every source that a line has under a key, sources in the order they came."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in view.metrics:
        of: Any = line.get(key)
        if not isinstance(of, dict) or "step" not in line:
            continue
        for name, value in of.items():
            if isinstance(value, int | float):
                found.setdefault(str(name), []).append((line["step"], float(value)))
    return found


def shares_of(view: ReportView) -> list[float]:
    """The shares that the recipe asks for, where it does, as parts of their sum."""
    sources = view.recipe.data if view.recipe is not None else []
    asked = [float(source.share) for source in sources if source.share is not None]
    return [share / sum(asked) for share in asked]
