"""The texts of sources, one by one, counted as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_ft.data.layouts import read_example
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source, named, open_sources
from llama_ft.errors import Problem, UserError

SAMPLES = 200
"""Texts kept to try a tokenizer on, from the start of every source."""
SAMPLE_LENGTH = 2000
"""Characters of each."""
EVERY = 100
"""Rows between two reports of progress."""

Progress = Callable[[str, int], None]


@dataclass
class Counted:
    """What was read of one source. `sha256`: its fingerprint, another one when its rows change."""

    source: str
    sha256: str
    rows: int = 0
    dropped: int = 0
    characters: int = 0
    bytes: int = 0


@dataclass
class Texts:
    """The texts of opened sources. Iterating reads them anew; `counted` is about the last reading."""

    sources: list[Source]
    progress: Progress | None = None
    counted: list[Counted] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """Raises :class:`UserError` with the malformed rows of a source when it ends."""
        self.counted.clear()
        self.samples.clear()
        for source in self.sources:
            for _, text in self.of(source):
                yield text

    def of(self, source: Source) -> Iterator[tuple[int, str]]:
        """(row, text) of one source; rows without text are counted and left out."""
        counted = Counted(source.label, source.fingerprint)
        self.counted.append(counted)
        problems, kept = Problems(), 0
        for row, value in source.rows(problems):
            example = read_example(value, source.layout, source.columns, source.where(row), problems)
            if example is None:
                continue
            counted.rows += 1
            if self.progress is not None and counted.rows % EVERY == 0:
                self.progress(source.label, counted.rows)
            if example.dropped is not None or example.text is None:
                counted.dropped += 1
                continue
            text = example.text
            counted.characters += len(text)
            counted.bytes += len(text.encode())
            if kept < SAMPLES:
                self.samples.append(text[:SAMPLE_LENGTH])
                kept += 1
            yield row, text
        problems.raise_if_any()

    def record(self) -> list[dict[str, Any]]:
        """The counts as plain data."""
        return [asdict(counted) for counted in self.counted]


def open_texts(names: Sequence[str], *, limit: int | None = None, progress: Progress | None = None) -> Texts:
    """Opens files, folders, patterns and cards that hold text. `limit`: rows taken of each source.

    Raises :class:`UserError` with the problems of all: missing, damaged, no such card, conversations instead of text.
    """
    sources = open_sources([named(name, limit) for name in names], "source")
    problems = []
    for number, source in enumerate(sources):
        if source.layout != "text":
            what = f"holds rows of layout {source.layout}, text is needed"
            hint = "plain text files, or rows with a key text; a card of layout text, such as python-files"
            problems.append(Problem(what, where=source.label, key=f"source.{number}", hint=hint))
    if problems:
        raise UserError(problems)
    return Texts(sources, progress)
