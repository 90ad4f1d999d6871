"""Where a recipe's rows come from: files, a data set on the hub, or the installed Python; and how they are shaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llama_ft.data.cards import Card, Files, Python, load_card
from llama_ft.data.file_rows import FileRows, open_files
from llama_ft.data.hub_rows import HubRows, open_hub
from llama_ft.data.layouts import LAYOUTS, check_layout, guess_layout
from llama_ft.data.problems import Problems
from llama_ft.data.python_code import PythonRows, open_python
from llama_ft.data.quality.steps import Quality
from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Data

FIRST_ROWS = 50
"""Rows that a layout is guessed from."""

Origin = FileRows | HubRows | PythonRows


@dataclass(frozen=True)
class Source:
    """An opened source: rows of some `origin` and how they are read. Picklable.

    `columns` renames the layout's keys, `system` is the system prompt of conversations that have none, `limit` the
    number of rows taken. `guessed` says what was guessed about the layout, in a sentence; None if all was said.
    `alone`: of a pair only the better answer is wanted. `quality`: the steps that judge its texts, if any.
    """

    origin: Origin
    layout: str
    columns: Mapping[str, str] | None = None
    system: str | None = None
    limit: int | None = None
    unit: str = "file"
    guessed: str | None = None
    alone: bool = False
    quality: Quality | None = None

    @property
    def shape(self) -> str:
        """The layout of its documents: its rows', but for pairs of which one answer is left."""
        return "messages" if self.alone and self.layout == "preference" else self.layout

    @property
    def label(self) -> str:
        """Names the source in messages and reports."""
        return self.origin.label

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex, another one when the rows change."""
        return self.origin.fingerprint

    @property
    def revision(self) -> str | None:
        """The commit of a set on the hub, or the Python that rows were made from; None for files."""
        return self.origin.revision

    @property
    def path(self) -> Path | None:
        """The file, or the folder that holds all files; None for a source without files."""
        if not isinstance(self.origin, FileRows):
            return None
        found = self.origin.found
        return found.files[0] if len(found.files) == 1 else found.base

    def where(self, row: int) -> str:
        """Names a row of this source in a message: `rows.jsonl, row 3`."""
        return self.origin.where(row)

    def rows(self, problems: Problems) -> Iterator[tuple[int, Any]]:
        """Yields (row, value) with 0-based rows, at most `limit`; file problems are added to `problems`."""
        rows = self.origin.rows(problems)
        try:
            for taken, (row, value) in enumerate(rows, start=1):
                yield row, value
                if taken == self.limit:
                    return
        finally:
            rows.close()  # which notes what was wrong so far

    def unchanged(self) -> bool:
        """Whether the rows are still what they were when the source was opened."""
        return self.origin.unchanged()


def named(name: str, limit: int | None = None) -> Data:
    """What a user means on the command line: a file, a folder or a pattern by path; else a card. `limit`: its rows."""
    path = Path(name).expanduser()
    is_path = path.exists() or any(mark in name for mark in "/*?[") or bool(path.suffix)
    if is_path and path.suffix not in (".yaml", ".yml"):
        return Data(path=name, limit=limit)
    return Data(use=name, limit=limit)


def open_sources(entries: list[Data], section: str = "data", *, streaming: bool = False) -> list[Source]:
    """Opens every entry of `data` (or `eval_data`); raises one :class:`UserError` with the problems of all of them.

    `streaming`: for sets that do not fit; nothing is read whole, fingerprints are of files' sizes and times.
    """
    sources: list[Source] = []
    problems: list[Problem] = []
    for number, entry in enumerate(entries):
        try:
            sources.append(_open(entry, f"{section}.{number}", streaming))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return sources


def _open(entry: Data, key: str, streaming: bool) -> Source:
    if entry.use is None and entry.path is None:
        raise UserError("a source needs use (a card) or path (a file)", key=key)
    card = load_card(entry.use, key=f"{key}.use") if entry.use is not None else None
    layout, columns = entry.layout or (card.layout if card else None), card.columns if card else None
    if layout is not None:
        check_layout(layout, columns, key=key)
    if card is None or entry.path is not None:
        origin: Origin = open_files(str(entry.path), unit=entry.unit, stamps=streaming, key=f"{key}.path")
    else:
        card.check_split(entry.split, key=f"{key}.split")
        origin = _of_card(card, entry, key, streaming)
    settled, renames, guessed = _settled(origin, layout, columns, key)
    quality = _quality(entry, settled, key)
    return Source(origin, settled, renames, entry.system, entry.limit, entry.unit, guessed, quality=quality)


def _quality(entry: Data, layout: str, key: str) -> Quality | None:
    if not entry.quality:
        return None
    if layout != "text":  # a card's layout, or a guessed one, is known only now
        raise UserError(f"the steps judge text, not {layout} rows", key=f"{key}.quality", hint="remove quality")
    quality = Quality(tuple(entry.quality), tuple(entry.languages))
    quality.check(f"{key}.languages")
    return quality


def _of_card(card: Card, entry: Data, key: str, streaming: bool) -> Origin:
    source = card.source
    if isinstance(source, Files):
        return open_files(str(card.file(entry.split)), unit=entry.unit, stamps=streaming, key=f"{key}.use")
    if isinstance(source, Python):
        return open_python(source.python, entry.split, key=f"{key}.use")
    instead = f"or fetch the rows yourself and add path: FILE beside use: {card.name}"
    return open_hub(source, source.splits[entry.split], streaming=streaming, key=f"{key}.use", instead=instead)


def _settled(
    origin: Origin, layout: str | None, columns: Mapping[str, str] | None, key: str
) -> tuple[str, Mapping[str, str] | None, str | None]:
    """The layout and its renames, with a sentence on what was guessed of them."""
    if isinstance(origin, FileRows) and origin.found.kind == "text":
        if layout not in (None, "text"):
            raise UserError(f"{origin.label} is plain text, its layout is text", key=f"{key}.layout", hint="remove it")
        return "text", None, None
    if layout is not None and (columns is not None or isinstance(origin, PythonRows)):
        return layout, columns, None
    first = _first_values(origin, needed=layout is None)
    guess = guess_layout(first)
    if layout is not None:
        if guess is None or guess[0] != layout or not guess[1]:
            return layout, columns, None
        renames = _renames(guess[1])
        return layout, guess[1], f"columns guessed from its keys: {renames}; name them in a card's columns to say so"
    if guess is None:
        raise _no_layout(origin, first, key)
    layout, renamed = guess[0], {**guess[1], **(columns or {})}
    check_layout(layout, renamed, key=key)
    how = f"{layout} ({_renames(renamed)})" if renamed else layout
    return layout, renamed or None, f"layout guessed from its keys: {how}; write layout: {layout} to say so"


def _renames(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {column}" for name, column in columns.items())


def _first_values(origin: Origin, *, needed: bool) -> list[Any]:
    """The first rows; raises what is wrong with the file where there are none and one is `needed`."""
    problems = Problems()
    rows = origin.rows(problems)
    values = [value for _, value in islice(rows, FIRST_ROWS)]
    rows.close()
    if needed and not values:
        problems.raise_if_any()
    return values


def _no_layout(origin: Origin, values: list[Any], key: str) -> UserError:
    keys = list(dict.fromkeys(str(name) for value in values if isinstance(value, dict) for name in value))
    listed = ", ".join(keys[:12]) + (" …" if len(keys) > 12 else "")
    what = f"no layout fits rows with the keys {listed}" if keys else "no layout fits rows that are not objects"
    hint = f"write layout: one of {', '.join(LAYOUTS)}; a card can rename columns"
    return UserError(what, where=origin.label, key=f"{key}.layout", hint=hint)
