"""A comparison as one HTML file, in the frame and style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_ft.data.page.shell import whole_page
from llama_ft.data.page.tokens import plural, safe
from llama_ft.errors import UserError
from llama_ft.evaluate.compare import Comparison
from llama_ft.evaluate.compare_curves import Line, lines_html
from llama_ft.files import write_text
from llama_ft.train.page.curves import NATS, Curve
from llama_ft.train.page.html import facts, section, table, text
from llama_ft.train.page.sections import answer_row
from llama_ft.train.page.write import HERE

FIGURES = (
    ("eval_loss", Curve("Held-out loss", [], NATS, large=True)),
    ("loss", Curve("Training loss", [], NATS, smooth=True, large=True)),
    ("eval_accuracy", Curve("Held-out accuracy", [], percent=True)),
    ("eval_reward", Curve("Held-out reward", [])),
    ("eval_margin", Curve("Held-out margin", [])),
    ("reward", Curve("Reward", [], smooth=True)),
    ("learning_rate", Curve("Learning rate", [], from_zero=True)),
    ("grad_norm", Curve("Gradient norm", [], from_zero=True, smooth=True)),
    ("tokens_per_second", Curve("Tokens per second", [], from_zero=True, smooth=True)),
)
"""Keys of metrics.jsonl and their figures; one that no run has is left out."""


def write_page(found: Comparison, target: Path) -> Path:
    """Writes the page. UserError if it cannot be written."""
    try:
        write_text(target, page(found))
    except OSError as error:
        raise UserError(f"the page cannot be written: {error.strerror or error}", where=str(target)) from error
    return target


def page(found: Comparison) -> str:
    """The whole page."""
    states = facts(((f"{side.letter} {safe(side.name)}", safe(side.state)) for side in found.sides), "settings")
    parts = [
        ("runs", "Runs", runs(found)),
        ("curves", "Curves", curves(found)),
        ("recipes", "Recipes", recipes(found)),
        ("evaluations", "Evaluations", evaluations(found)),
        ("answers", "Answers", answers(found)),
        ("surroundings", "Surroundings", surroundings(found)),
    ]
    return whole_page(
        HERE,
        title=f"{found.named} side by side",
        header=f"""<a class="skip" href="#content">Skip to the content</a>
<header class="page"><p class="kind">llama-ft compare</p><h1>{found.named} side by side</h1>
{states}</header>""",
        notes="",
        sections=parts,
    )


def runs(found: Comparison) -> str:
    """Losses and costs, run by run, and what to know of them."""
    notes = "".join(f"<li>{safe(note)}</li>" for note in found.notes())
    losses = rows_html("Runs", found.losses()) if found.runs else ""
    return section("runs", "Runs", "", losses + (f'<ul class="notes">{notes}</ul>' if notes else ""))


def curves(found: Comparison) -> str:
    """Every measure that a run logged, all runs in one figure each."""
    drawn = ""
    for key, figure in FIGURES:
        kind = figure if found.in_nats else replace(figure, unit="")
        series = [(side.letter, side.view.series(key)) for side in found.sides]
        drawn += lines_html(kind, [Line(letter, place, values) for place, (letter, values) in enumerate(series)])
    about = "Point at a curve, or step along it with the arrow keys, to read its values."
    return section("curves", "Curves", about, drawn and f'<div class="curves">{drawn}</div>')


def recipes(found: Comparison) -> str:
    """The keys in which the recipes differ."""
    rows = found.recipes()
    equal = "<p>The recipes are equal.</p>" if len(found.runs) > 1 else ""
    body = rows_html("Recipes", rows) if len(rows) > 1 else equal
    return section("recipes", "Recipes", "", body)


def evaluations(found: Comparison) -> str:
    """Scores with their intervals, and each run's difference from the first."""
    rows = found.evaluations()
    about = (
        "95 % intervals over items. Δ: less the first run's, over the items that both answered; "
        "* where the interval does not hold 0."
    )
    return section("evaluations", "Evaluations", about, rows_html("Evaluations", rows) if len(rows) > 1 else "")


def answers(found: Comparison) -> str:
    """Questions that several runs were asked at their ends; equal answers stand together."""
    articles = []
    for place, (question, said) in enumerate(found.samples(), 1):
        rows = "".join(
            answer_row(
                safe(who), answer, "reference" if who == "reference" else "before" if "before" in who else "after"
            )
            for who, answer in said
        )
        asked = f'<p class="asked" dir="auto">{text(question)}</p>'
        articles.append(f'<article class="sample"><h3>Question {place}</h3>{asked}<dl>{rows}</dl></article>')
    about = f"{plural(len(articles), 'held-out question')}, answered greedily when each run began and ended."
    return section("answers", "Answers", about, "".join(articles))


def surroundings(found: Comparison) -> str:
    """Where the locks differ."""
    rows = found.surroundings()
    return section("surroundings", "Surroundings", "", rows_html("Surroundings", rows) if len(rows) > 1 else "")


def rows_html(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain cells, the first of them the heads, as a table."""
    head, *body = [[safe(cell) for cell in row] for row in rows]
    return table(title, head, body)
