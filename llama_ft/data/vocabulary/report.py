"""`llama-ft tokenizer report`: tokenizers side by side on the same texts, by source and by language."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from llama_ft.data.show import console, rows_line
from llama_ft.data.vocabulary.texts import open_texts
from llama_ft.errors import Problem, UserError
from llama_ft.tokenizer.measure import Cut, Cutter

if TYPE_CHECKING:
    from llama_ft.data.languages import Detector

PART = 2000
"""Characters of which a language is told: a source may be one long text in several."""
LEAST = 0.01
"""Share of the characters that a language needs for rows of its own; rarer ones are `other`, errors among them."""
OTHER, UNTOLD = "other languages", "too few letters"
WIDTH = 160
_BREAK = re.compile(r"\n+")


@dataclass(frozen=True)
class Row:
    """One tokenizer on one part of the texts. `kind`: all, source or language; `on`: which of them."""

    tokenizer: str
    vocabulary: int
    kind: str
    on: str
    cut: Cut

    def as_dict(self) -> dict[str, Any]:
        """Plain data; shares are between 0 and 1, None where there is nothing to divide by."""
        figures = self.cut.figures(self.vocabulary)
        return {
            "tokenizer": self.tokenizer,
            "vocabulary": self.vocabulary,
            "kind": self.kind,
            "on": self.on,
            **figures,
        }


def measure_tokenizers(names: Sequence[str], sources: Sequence[str], *, limit: int | None = None) -> list[Row]:
    """Cuts every text of `sources` with every tokenizer of `names`; rows by all, source and language, in this order.

    `limit`: rows of each source. There are no rows by language where py3langid is missing, and none of `all` for a
    single source. Raises :class:`UserError` with every tokenizer that cannot be opened, and for sources that are no
    text.
    """
    cutters = _open(names)
    texts = open_texts(sources, limit=limit)
    languages = _languages()
    by: dict[tuple[str, str], list[Cut]] = {}

    def of(kind: str, on: str) -> list[Cut]:
        return by.setdefault((kind, on), [Cut() for _ in cutters])

    with rows_line() as progress:
        texts.progress = progress
        for number, source in enumerate(texts.sources):
            for _, text in texts.of(source):
                starts = part_starts(text)
                ends = [*starts[1:], len(text)]
                told = [languages.of(text[a:b]) for a, b in zip(starts, ends, strict=True)] if languages else None
                for one, cutter in enumerate(cutters.values()):
                    cuts = cutter.cut(text, starts if told else (0,))
                    for part, cut in enumerate(cuts):
                        of("source", str(number))[one].add(cut)
                        if told:
                            of("language", told[part] or UNTOLD)[one].add(cut)
    if not any(cuts[0].characters for cuts in by.values()):
        raise UserError("there is no text to measure on", hint="the sources hold rows without text alone")
    labels = {str(number): source.label for number, source in enumerate(texts.sources)}
    return _rows(cutters, by, labels)


def _rows(cutters: dict[str, Cutter], by: dict[tuple[str, str], list[Cut]], labels: dict[str, str]) -> list[Row]:
    """The rows in their order; languages by their share of the characters, rare ones together."""
    groups: list[tuple[str, str, list[Cut]]] = []
    sources = [(labels[on], cuts) for (kind, on), cuts in by.items() if kind == "source"]
    if len(sources) > 1:
        groups.append(("all", "all", _sum([cuts for _, cuts in sources])))
    groups += [("source", label, cuts) for label, cuts in sources]
    told = {on: cuts for (kind, on), cuts in by.items() if kind == "language"}
    total = sum(cuts[0].characters for cuts in told.values())
    often = {on: cuts for on, cuts in told.items() if cuts[0].characters >= LEAST * total}
    rare = [cuts for on, cuts in told.items() if on not in often]
    groups += [("language", on, often[on]) for on in sorted(often, key=lambda on: (-often[on][0].characters, on))]
    if rare:
        groups.append(("language", OTHER, _sum(rare)))
    return [
        Row(name, cutter.vocabulary, kind, on, cuts[one])
        for kind, on, cuts in groups
        for one, (name, cutter) in enumerate(cutters.items())
    ]


def _sum(groups: list[list[Cut]]) -> list[Cut]:
    totals = [Cut() for _ in groups[0]]
    for cuts in groups:
        for total, cut in zip(totals, cuts, strict=True):
            total.add(cut)
    return totals


def part_starts(text: str, length: int = PART) -> list[int]:
    """Where the parts of a text begin: at its start, and behind the first line end after `length` characters each."""
    starts = [0]
    while (line_end := _BREAK.search(text, starts[-1] + length)) is not None and line_end.end() < len(text):
        starts.append(line_end.end())
    return starts


def _open(names: Sequence[str]) -> dict[str, Cutter]:
    from llama_ft.llama import smollm2
    from llama_ft.tokenizer.load import load_tokenizer

    cutters: dict[str, Cutter] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            tokenizer = load_tokenizer(smollm2.smollm2_folder() if name == smollm2.NAME else name)
        except UserError as error:
            problems += [Problem(one.what, one.where, f"tokenizer {name}", one.hint) for one in error.problems]
            continue
        cutters[name] = Cutter(tokenizer)
    if problems:
        raise UserError(problems)
    return cutters


def _languages() -> Detector | None:
    from llama_ft.data.languages import Detector

    try:
        return Detector(())
    except UserError:  # the package is missing
        return None


def print_tokenizer_report(
    names: Sequence[str], sources: Sequence[str], *, limit: int | None = None, as_json: bool = False
) -> None:
    """The rows on stdout: a table, or with `as_json` one JSON list."""
    rows = measure_tokenizers(names, sources, limit=limit)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows], indent=2, ensure_ascii=False))
        return
    print_rows(rows, sys.stdout)
    if not any(row.kind == "language" for row in rows):
        print("languages are not told apart: pip install llama-ft[data]")


def print_rows(rows: Sequence[Row], out: IO[str]) -> None:
    """The table: a group for each source and language, in it a line for each tokenizer."""
    table = Table(box=None, pad_edge=False)
    table.add_column("on", overflow="fold")
    table.add_column("tokenizer", overflow="fold")
    heads = ("pieces", "tokens", "tokens/word", "bytes/token", "chars/token", "one byte", "broken", "unknown", "used")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    before = None
    for row in rows:
        figures = row.cut.figures(row.vocabulary)
        shares = [_share(figures[name]) for name in ("one_byte", "broken", "unknown", "used")]
        ratios = [_two(figures[name]) for name in ("tokens_per_word", "bytes_per_token", "characters_per_token")]
        here = (row.kind, row.on)
        label = "" if here == before else Path(row.on).name if row.kind == "source" else row.on
        cells = [label, _short(row.tokenizer), f"{row.vocabulary:,}", f"{row.cut.tokens:,}", *ratios, *shares]
        table.add_row(*map(Text, cells))
        before = here
    console(out, WIDTH).print(table)


def _short(name: str) -> str:
    """The last two parts of a path; a hub id as it is."""
    return "/".join(Path(name).parts[-2:]) if Path(name).exists() else name


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
