"""Whole texts to measure on: what `--data` names, the run's own held-out ones, else modules of the Python that runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_ft.data.layouts import read_example
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source, open_sources
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.material import data_entry, data_problems, holds_documents, labels_of
from llama_ft.recipe.schema import Data

if TYPE_CHECKING:
    from llama_ft.evaluate.suites import Context

CARD, SPLIT = "python-files", "heldout"
"""Where nothing else is named: code that every user has."""


@dataclass(frozen=True)
class Text:
    """A text of a source; id: the source's label and the 0-based number of the row."""

    id: str
    text: str


def text_problems(context: Context, suite: str) -> list[Problem]:
    """What is wrong with the names that `--data` gave: there is no such thing, or it is no text."""
    problems = data_problems(context)
    if problems:
        return problems
    try:
        sources = text_sources(context)
    except UserError as error:
        return error.problems
    return [
        Problem(
            f"{source.label} holds rows of layout {source.layout}, the suite {suite} measures on text",
            key="--data",
            hint="name files of text or code, rows with --layout text, or a card such as python-files",
        )
        for _, source in sources
        if source.layout != "text"
    ]


def text_sources(context: Context) -> list[tuple[str, Source]]:
    """The sources to measure on, opened, each with a short name. UserError where one cannot be opened."""
    named = [name for name in context.data if holds_documents(name)]
    if named:
        sources = open_sources([data_entry(name, context.layout) for name in named], "--data")
    else:
        sources = _own(context) or open_sources([Data(use=CARD, split=SPLIT)], "--data")
    return list(zip(labels_of(sources), sources, strict=True))


def _own(context: Context) -> list[Source]:
    """The run's held-out sources of text. A share of its rows that was held out is not among them: of those the
    prepared tokens alone are kept, which are cut already."""
    entries = context.run.recipe.eval_data if context.run is not None else None
    if not isinstance(entries, list):
        return []
    return [source for source in open_sources(entries, "eval_data") if source.layout == "text"]


def read_texts(context: Context) -> list[Text]:
    """The texts of all sources in order, those without a letter left out. UserError naming bad rows, or for none."""
    found = []
    problems = Problems()
    for label, source in text_sources(context):
        found += [Text(f"{label}:{row}", text) for row, text in _rows(source, problems)]
        problems.raise_if_any()
    if not found:
        raise UserError("there is no text to measure on", key="--data", hint="name files of text or code")
    return found


def _rows(source: Source, problems: Problems) -> Iterator[tuple[int, str]]:
    for row, value in source.rows(problems):
        example = read_example(value, source.layout, source.columns, source.where(row), problems)
        if example is not None and example.dropped is None and example.text:
            yield row, example.text
