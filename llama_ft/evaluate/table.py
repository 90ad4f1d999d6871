"""Scores of all subjects side by side, for a terminal and for the page: values, intervals, differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_ft.evaluate.leaks import leaks_said
from llama_ft.evaluate.quick import CHOSEN
from llama_ft.evaluate.result import Score, SuiteResult, compared

SIGNIFICANT = "*"
"""Beside a difference whose interval does not hold 0."""
OF_THE_SUBJECT = ("weights", "computed_in", "answers")
"""Settings that say who was asked, or what it answered to be judged."""
IN_WORDS = ("template", "asked", "system")
"""Settings that say in which words: a base in its own template and a run in its own can both be right. All further ones
say what was asked, and nothing is subtracted where they differ."""
OF_DOCUMENTS = ("heldout", "quick")
"""Suites whose items are numbered rows of files."""


@dataclass(frozen=True)
class Gap:
    """How the last subject differs from the first in one score: right less left, its 95 % interval, over `rows` pairs.

    `verdict`: better or worse where the interval does not hold 0, else "".
    """

    value: float
    low: float
    high: float
    rows: int
    verdict: str


def gap(found: tuple[float, float, float, int], better: str) -> Gap:
    """A difference with what it means."""
    value, low, high, rows = found
    sure = low > 0 or high < 0
    up = "better" if (value > 0) == (better == "higher") else "worse"
    return Gap(value, low, high, rows, up if sure else "")


def said(value: float, unit: str) -> str:
    """A value as it is shown: three decimals of nats and bits, shares in percent."""
    if not math.isfinite(value):
        return "–"
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.3f}" if unit in ("nats", "bits") or abs(value) < 100 else f"{value:,.0f}"


def cell(score: Score | None) -> str:
    """`1.234 [1.200, 1.260]`; a dash for none."""
    if score is None:
        return "–"
    return f"{said(score.value, score.unit)} [{said(score.low, score.unit)}, {said(score.high, score.unit)}]"


def difference(found: Gap, unit: str) -> str:
    """`-0.210 [-0.250, -0.170] * better`."""
    numbers = [f"{'+' if value > 0 else ''}{said(value, unit)}" for value in (found.value, found.low, found.high)]
    sure = f" {SIGNIFICANT} {found.verdict}" if found.verdict else ""
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]{sure}"


def delta(first: SuiteResult, other: SuiteResult, score: Score) -> str:
    """The other's score less the first's, with its interval; why there is none, where they cannot be paired. Nothing
    for a score that is no mean over items, as perplexity."""
    if not (first.values(score.name) and other.values(score.name)):
        return ""
    one, two = _asked(first), _asked(other)
    otherwise = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    if otherwise:
        return f"none: asked otherwise ({', '.join(otherwise)})"
    if first.suite in OF_DOCUMENTS:
        first = _of_same_text(first, other)
    found = compared(first, other, first.settings.get("seed", 0)).get(score.name)
    if found is None:
        return "none: no items in common"
    shown = difference(gap(found, score.better), score.unit)
    most = max(len(first.values(score.name)), len(other.values(score.name)))
    few = f", over {found[3]:,} of {most:,} items" if found[3] < most else ""
    return shown + few + ("" if score.name.endswith(CHOSEN) else _words(first, other))


def _asked(result: SuiteResult) -> dict[str, Any]:
    """The settings that must be equal. A file is known by what `files` says of it where that is there, else by name,
    size and time, wherever it lies; how many documents were not too long is not a way of asking."""
    left_out = {*OF_THE_SUBJECT, *IN_WORDS, *(("data",) if "files" in result.settings else ())}
    left_out |= {"documents"} if result.suite == "heldout" else set()
    found = {key: value for key, value in result.settings.items() if key not in left_out}
    for key in ("data", "files"):
        if isinstance(found.get(key), dict):
            found[key] = sorted((Path(name).name, stamp) for name, stamp in found[key].items())
    return found


def _of_same_text(first: SuiteResult, other: SuiteResult) -> SuiteResult:
    """Without the rows that ask something else under the same id: two runs may have two files of one name."""
    asked = {str(row["id"]): row.get("asked") for row in other.rows}
    rows = [row for row in first.rows if row.get("asked") == asked.get(str(row["id"]), row.get("asked"))]
    return replace(first, rows=rows)


def _words(first: SuiteResult, other: SuiteResult) -> str:
    """A remark where both are known to have been asked in other words."""
    one, two = first.settings, other.settings
    differ = any(one[key] != two[key] for key in IN_WORDS if key in one and key in two)
    return ", asked in another template" if differ else ""


def suite_rows(results: Sequence[SuiteResult]) -> list[list[str]]:
    """One suite's results of several subjects as rows, the heads first: score, items, a column per subject, and the
    difference of each later subject from the first."""
    first, *others = results
    heads = [f"{other.subject} − {first.subject}" for other in others]
    rows = [["", "items", *(result.subject for result in results), *heads]]
    for name in dict.fromkeys(score.name for result in results for score in result.scores):
        scores = [result.score(name) for result in results]
        known = next(score for score in scores if score is not None)
        gaps = [
            "" if None in (scores[0], one) else delta(first, other, known)
            for other, one in zip(others, scores[1:], strict=True)
        ]
        rows.append([name, f"{known.rows:,}", *map(cell, scores), *gaps])
    return rows


def notes(results: Sequence[SuiteResult]) -> list[str]:
    """What to know of one suite's results: leaks, and time."""
    found = []
    leaked = next((result.leaks for result in results if result.leaks), {})
    if leaked:
        found.append(f"leaks: {leaks_said(leaked)}")
        found += [f"  {one['id']} in {one['row']} ({one['share']:.0%} of it)" for one in leaked.get("where", [])]
    found += [f"{result.subject}: {remark}" for result in results for remark in result.remarks]
    times = ", ".join(f"{result.subject} {result.seconds:.0f} s" for result in results)
    found.append(f"measured in {times}; {results[0].settings.get('computed_in', '')}".rstrip("; "))
    return found


def print_results(suites: Sequence[Sequence[SuiteResult]], console: Console | None = None) -> None:
    """Every suite as a table on a terminal, as aligned plain lines elsewhere."""
    console = console or Console()
    for results in suites:
        title, rows = results[0].suite, suite_rows(results)
        if console.is_terminal:
            table = Table(title=title, title_style="bold", title_justify="left")
            for place, head in enumerate(rows[0]):
                table.add_column(escape(head), justify="left" if place == 0 else "right", overflow="fold")
            for row in rows[1:]:
                table.add_row(*map(escape, row))
            console.print(table)
        else:
            widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
            print(title)
            for row in rows:
                cells = [f"{text:{width}}" for text, width in zip(row, widths, strict=True)]
                print("  " + "  ".join(cells).rstrip())
        for note in notes(results):
            console.print(f"  {note}", highlight=False, soft_wrap=True, markup=False)
    if any(len(results) > 1 for results in suites):
        said_once = f"95 % bootstrap intervals over items; differences over the same items, {SIGNIFICANT} without 0"
        console.print(f"{said_once} in the interval", highlight=False, soft_wrap=True, markup=False)
