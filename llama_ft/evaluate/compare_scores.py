"""eval/SUITE-SUBJECT.json of several runs and models as one table: values, intervals, differences paired by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_ft.errors import UserError
from llama_ft.evaluate.result import Score, SuiteResult
from llama_ft.evaluate.table import cell, delta

OTHERS = ("samples.json", "accuracy.json")
"""What training leaves in eval/."""


class Scored(NamedTuple):
    """What was measured of one side. alone: a model by itself, whose one subject has a name of its own."""

    letter: str
    results: Sequence[SuiteResult]
    alone: bool = False


def result_files(folder: Path) -> list[Path]:
    """The files of an eval/ folder that should be results."""
    return [path for path in sorted(folder.glob("*.json")) if path.name not in OTHERS]


def read_scores(folder: Path) -> tuple[list[SuiteResult], list[str]]:
    """The results of a run's eval/ folder, and the names of files there that are none."""
    found, damaged = [], []
    for path in result_files(folder):
        try:
            found.append(SuiteResult.read(path))
        except UserError:
            damaged.append(f"eval/{path.name}")
    return found, damaged


def score_rows(sides: Sequence[Scored]) -> list[list[str]]:
    """Heads, then suite by suite and subject by subject a row per score: each side's value and its interval.

    A model by itself stands in the rows of every subject, so that `tuned` of a run is held against it. Of every side
    but the first that has a score, the cell goes on with the difference from that one: paired over the items that both
    answered, and judged where its interval does not hold 0.
    """
    rows = [["suite, of, score", *(side.letter for side in sides)]]
    for suite, subject, name in _keys(sides):
        cells: list[str] = []
        first: SuiteResult | None = None
        for side in sides:
            result, score = _of(side, suite, subject, name)
            if result is None or score is None:
                cells.append("-")
                continue
            less = "" if first is None else delta(first, result, score)
            cells.append(cell(score) + (f"; Δ {less}" if less else ""))
            first = first or result
        rows.append([f"{suite}, {subject}, {name}", *cells])
    return rows


def _keys(sides: Sequence[Scored]) -> list[tuple[str, str, str]]:
    """(suite, subject, score) of every row. What only models by themselves were asked is of `model`."""
    trained = {result.suite for side in sides if not side.alone for result in side.results}
    names: dict[tuple[str, str], dict[str, None]] = {}
    models: dict[str, dict[str, None]] = {}
    for side in sides:
        for result in side.results:
            own = dict.fromkeys(score.name for score in result.scores)
            if not side.alone or result.suite not in trained:
                names.setdefault((result.suite, "model" if side.alone else result.subject), {}).update(own)
            if side.alone:
                models.setdefault(result.suite, {}).update(own)
    return [
        (suite, subject, name) for (suite, subject), own in names.items() for name in {**own, **models.get(suite, {})}
    ]


def _of(side: Scored, suite: str, subject: str, name: str) -> tuple[SuiteResult | None, Score | None]:
    for result in side.results:
        if result.suite == suite and (side.alone or result.subject == subject):
            return result, result.score(name)
    return None, None
