"""Scores of all subjects side by side, for a terminal and for the page: values, intervals, differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from llama_ft.evaluate.leaks import leaks_said
from llama_ft.evaluate.result import Score, SuiteResult, compared

SIGNIFICANT = "*"
"""Beside a difference whose interval does not hold 0."""


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


def suite_rows(results: Sequence[SuiteResult]) -> list[list[str]]:
    """One suite's results of several subjects as rows, the heads first: score, items, a column per subject, and the
    difference of each later subject from the first."""
    first, *others = results
    pairs = [(other, compared(first, other, first.settings.get("seed", 0))) for other in others]
    heads = [f"{other.subject} − {first.subject}" for other in others]
    rows = [["", "items", *(result.subject for result in results), *heads]]
    for name in dict.fromkeys(score.name for result in results for score in result.scores):
        scores = [result.score(name) for result in results]
        known = next(score for score in scores if score is not None)
        gaps = [difference(gap(gaps[name], known.better), known.unit) if name in gaps else "" for _, gaps in pairs]
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
                table.add_column(head, justify="left" if place == 0 else "right", overflow="fold")
            for row in rows[1:]:
                table.add_row(*row)
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
