"""What each quality step did to some files: rows it saw and dropped, by rule, with an example of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from rich.text import Text

from llama_ft.data.show import console

SHOWN = 3
"""Rows named for each rule in the report's file."""

Effect = Literal["changed", "dropped"]


@dataclass
class Rule:
    """One rule of a step: how many rows it dropped or took something out of, the first of them, and how one begins."""

    step: str
    rule: str
    effect: Effect
    rows: int = 0
    first: list[str] = field(default_factory=list)
    example: str = ""


@dataclass
class FilterReport:
    """Rows in and out, and every rule that did something. `seen`: rows that came to each step, in the steps' order.

    `steps`: of each source. Characters are those of the texts, as read and as written.
    """

    sources: list[str]
    steps: dict[str, list[str]]
    output: str
    settings: dict[str, Any]
    rows_in: int = 0
    rows_out: int = 0
    characters_in: int = 0
    characters_out: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)

    def note(self, step: str, rule: str, effect: Effect, where: str, example: str) -> None:
        """Counts one row."""
        entry = next((known for known in self.rules if (known.step, known.rule) == (step, rule)), None)
        if entry is None:
            entry = Rule(step, rule, effect, example=example)
            self.rules.append(entry)
        entry.rows += 1
        if len(entry.first) < SHOWN:
            entry.first.append(where)

    def dropped(self, step: str) -> int:
        """Rows that a step dropped."""
        return sum(one.rows for one in self.rules if (one.step, one.effect) == (step, "dropped"))

    def of_step(self, step: str) -> list[Rule]:
        """A step's rules, the one that met most rows first."""
        return sorted((one for one in self.rules if one.step == step), key=lambda one: (-one.rows, one.rule))

    def as_dict(self) -> dict[str, Any]:
        """For the .json beside the output."""
        return {**asdict(self), "dropped": {step: self.dropped(step) for step in self.seen}}


def print_filter_report(report: FilterReport, out: IO[str]) -> None:
    """A line per step, one per rule with an example below it, and what is left."""
    lines = [f"{report.rows_in:,} rows"]
    lines += [f"  {label}: {', '.join(steps)}" for label, steps in report.steps.items()]
    for step, seen in report.seen.items():
        rules = report.of_step(step)
        if step != "reading" or rules:
            lines.append(f"{step}: {report.dropped(step):,} of {seen:,} dropped")
        for one in rules:
            begins = f": {one.example}" if one.example else ""
            lines.append(f"  {one.rows:>7,} {one.effect}: {one.rule} ({one.first[0]}{begins})")
    rows, size = (_share(*pair) for pair in _pairs(report))
    lines.append(f"{report.rows_out:,} rows kept ({rows}), with {size} of the characters, in {report.output}")
    console(out).print(Text("\n".join(lines)))


def _pairs(report: FilterReport) -> tuple[tuple[int, int], tuple[int, int]]:
    return (report.rows_out, report.rows_in), (report.characters_out, report.characters_in)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"
