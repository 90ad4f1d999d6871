"""RUN/eval/SUITE-SUBJECT.json of several runs as one table: values with intervals, differences paired by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.evaluate.result import Score, SuiteResult, compared
from llama_ft.evaluate.table import cell, difference, gap

OTHERS = ("samples.json", "accuracy.json")
"""What training leaves in eval/."""
OF_THE_SUBJECT = ("weights", "computed_in")
"""Settings that say who was asked; all others say what."""


def read_scores(folder: Path) -> tuple[list[SuiteResult], list[str]]:
    """The results of a run's eval/ folder, and the names of files there that are none."""
    found, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        if path.name in OTHERS:
            continue
        try:
            found.append(SuiteResult.read(path))
        except UserError:
            damaged.append(f"eval/{path.name}")
    return found, damaged


def score_rows(sides: Sequence[tuple[str, Sequence[SuiteResult]]]) -> list[list[str]]:
    """Heads, then suite by suite and subject by subject a row per score: each run's value and its interval.

    sides: (letter, results) of each run. Of every run but the first that has a score, the cell goes on with the
    difference from that one: paired over the items that both answered, and judged where its interval does not hold 0.
    """
    rows = [["suite, of, score", *(letter for letter, _ in sides)]]
    keys = dict.fromkeys(
        (result.suite, result.subject, score.name)
        for _, results in sides
        for result in results
        for score in result.scores
    )
    for suite, subject, name in keys:
        cells: list[str] = []
        first: SuiteResult | None = None
        for _, results in sides:
            result, score = _of(results, suite, subject, name)
            if result is None or score is None:
                cells.append("-")
                continue
            cells.append(cell(score) + (f"; Δ {delta(first, result, score)}" if first is not None else ""))
            first = first or result
        rows.append([f"{suite}, {subject}, {name}", *cells])
    return rows


def _of(results: Sequence[SuiteResult], suite: str, subject: str, name: str) -> tuple[SuiteResult | None, Score | None]:
    for result in results:
        if (result.suite, result.subject) == (suite, subject):
            return result, result.score(name)
    return None, None


def delta(first: SuiteResult, other: SuiteResult, score: Score) -> str:
    """The other's score less the first's, with its interval; why there is none, where they cannot be paired."""
    asked = first.settings.keys() | other.settings.keys()
    otherwise = sorted(
        key for key in asked if key not in OF_THE_SUBJECT and first.settings.get(key) != other.settings.get(key)
    )
    if otherwise:
        return f"none: asked otherwise ({', '.join(otherwise)})"
    found = compared(first, other, first.settings.get("seed", 0)).get(score.name)
    return "none: no items in common" if found is None else difference(gap(found, score.better), score.unit)
