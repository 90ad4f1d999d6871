"""What a suite shows besides its table: nats by position as a curve, a number found by length and depth as a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_ft.data.page.tokens import safe
from llama_ft.evaluate.compare_curves import Line, lines_html
from llama_ft.evaluate.passkey import cell_name
from llama_ft.evaluate.positions import pairs, score_name
from llama_ft.evaluate.result import SuiteResult
from llama_ft.train.page.curves import NATS, Curve
from llama_ft.train.page.html import table


def picture(group: Sequence[SuiteResult]) -> str:
    """HTML for one suite's results of several subjects; nothing for most suites."""
    draw = PICTURES.get(group[0].suite)
    drawn = draw(group) if draw is not None else ""
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def _curve(group: Sequence[SuiteResult]) -> str:
    lines = []
    for place, result in enumerate(group):
        buckets = pairs(result.settings.get("borders", []))
        known = [(start, stop, result.score(score_name(start, stop))) for start, stop in buckets]
        values = [((start + stop) // 2, score.value) for start, stop, score in known if score is not None]
        lines.append(Line(safe(result.subject), place, values))
    kind = Curve("nats per token by position, each dot the mean of a bucket", [], NATS, large=True, by="position")
    return lines_html(kind, lines)


def _grid(group: Sequence[SuiteResult]) -> str:
    """Of each subject a table: a row per length, a column per depth, hits of questions."""
    shown = []
    for result in group:
        depths, lengths = result.settings.get("depths", []), result.settings.get("lengths", [])
        rows = [[f"{length:,}", *(_cell(result, cell_name(length, depth)) for depth in depths)] for length in lengths]
        title = f"{safe(result.subject)}: found, by length in tokens and depth"
        grid = table(title, ["length", *(f"{100 * depth:g} %" for depth in depths)], rows)
        shown.append(f"<figure><figcaption><strong>{title}</strong></figcaption>{grid}</figure>")
    return "".join(shown)


def _cell(result: SuiteResult, name: str) -> str:
    score = result.score(name)
    return "–" if score is None else f"{round(score.value * score.rows)}/{score.rows}"


PICTURES: dict[str, Callable[[Sequence[SuiteResult]], str]] = {"positions": _curve, "passkey": _grid}
"""By suite."""
