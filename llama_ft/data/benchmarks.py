"""Prompts of benchmarks and held-out rows, to keep them out of training rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from llama_ft.data.cards import load_card
from llama_ft.data.layouts import read_example
from llama_ft.data.overlap import OverlapIndex
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source, open_sources
from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Data

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "text", "turns")
"""Where benchmark files hold what is asked, the most telling name first."""


def open_benchmarks(names: list[str]) -> list[Source]:
    """The sources of `mixture.benchmarks`: every split of a card, or a file of prompts.

    Raises :class:`UserError` with the problems of all of them.
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    for number, name in enumerate(names):
        key = f"mixture.benchmarks.{number}"
        try:
            if Path(name).exists():
                entries = [Data(path=name, layout="text")]
            else:
                entries = [Data(use=name, split=split) for split in load_card(name, key=key).splits]
            sources += open_sources(entries, key)
        except UserError as error:  # one line for a set: its splits lie in the same place
            first = error.problems[0]
            hint = f"name a file of its prompts instead of {name}" if not Path(name).exists() else first.hint
            problems.append(replace(first, key=key, hint=hint))
    if problems:
        raise UserError(problems)
    return sources


@dataclass(frozen=True)
class Leak:
    """What a training row must not hold: of which `kind` (`benchmark` or `eval`), and the place of the test row."""

    kind: str
    where: str

    @classmethod
    def read(cls, name: str) -> Leak:
        """The leak that an index of :func:`overlap_indexes` names."""
        return cls(*json.loads(name))


NEARLY_WHOLE = 0.9
"""How much of a held-out row a training row must hold to be taken for it where nobody asked to decontaminate: rows
that are alike are what a held-out set consists of."""


def overlap_indexes(benchmarks: list[Source], held_out: list[Source], *, decontaminate: bool) -> list[OverlapIndex]:
    """Indexes of everything that training rows must not hold; none for what is empty.

    Raises :class:`UserError` with the rows that cannot be read.
    """
    problems = Problems()
    indexes = []
    for kind, sources in (("benchmark", benchmarks), ("eval", held_out)):
        index = OverlapIndex(0.0 if decontaminate or kind == "benchmark" else NEARLY_WHOLE, whole=kind == "eval")
        for source in sources:
            for row, said in _said(source, problems, asked=kind == "benchmark"):
                index.add(said, json.dumps(astuple(Leak(kind, source.where(row)))))
        indexes += [index] if len(index) else []
    problems.raise_if_any()
    return indexes


def _said(source: Source, problems: Problems, *, asked: bool) -> Iterator[tuple[int, str]]:
    """(row, what it says) for every row; of a benchmark's file (`asked`) what it asks. Notes what cannot be read."""
    for row, value in source.rows(problems):
        said = _prompt(value) if asked and source.path is not None and source.layout == "text" else None
        if said is None:
            example = read_example(value, source.layout, source.columns, source.where(row), problems)
            said = example.said if example is not None else None
        if said:
            yield row, said


def _prompt(value: Any) -> str | None:
    """The prompt of a benchmark's row, whatever its column is called."""
    if not isinstance(value, dict):
        return None
    for name in PROMPT_COLUMNS:
        said = value.get(name)
        if isinstance(said, str):
            return said
        if isinstance(said, list) and all(isinstance(part, str) for part in said):
            return "\n\n".join(said)
    return None
