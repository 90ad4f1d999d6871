"""A comparison as plain text: aligned columns, one line per row, nothing wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_ft.evaluate.compare import Comparison

WIDEST = 60
"""A longer cell moves what stands right of it, on its own line alone."""
ANSWER = 240
"""Characters of an answer that a terminal shows; the page has all of it."""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines in columns, two spaces apart; rows may end early."""
    widths: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row):
            if len(cell) <= WIDEST:
                widths[column] = max(widths.get(column, 0), len(cell))
    return ["  ".join(cell.ljust(widths.get(n, 0)) for n, cell in enumerate(row)).rstrip() for row in rows]


def lines(found: Comparison) -> Iterator[str]:
    """All of a comparison, part by part, each below its name."""
    yield from aligned([[side.letter, side.name, side.state] for side in found.sides])
    for name, rows in (
        ("losses", found.losses()),
        (f"recipes: {found.counted()}", found.recipes()),
        ("surroundings", found.surroundings()),
        ("evaluations, with 95 % intervals", found.evaluations()),
    ):
        if len(rows) > 1:
            yield from ("", name, *aligned(rows))
    for place, (question, answers) in enumerate(found.samples(), 1):
        yield from ("", f"sample {place}: {one_line(question)}")
        yield from aligned([["", who, one_line(said)] for who, said in answers])
    for note in found.notes():
        yield from ("", note)


def one_line(text: str) -> str:
    """A text on one line, cut where it is long, without signs that steer a terminal."""
    words = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return words if len(words) <= ANSWER else f"{words[:ANSWER]} …"
