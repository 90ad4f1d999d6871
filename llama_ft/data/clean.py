"""Logs of conversations, cleaned as Vicuna's authors cleaned ShareGPT (FastChat, docs/commands/data_cleaning.md).

Each row goes through the steps in one order: HTML to markdown, order of turns, empty turns, notices of the page,
language, copies, and splitting at turn borders. What a step changes or drops is counted by rule, with the first rows.
Rows are read and written one at a time; of each, two hashes of 16 bytes stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from rich.text import Text

from llama_ft.data.cleaning.copies import SHORTER, Copies
from llama_ft.data.cleaning.language import Languages
from llama_ft.data.cleaning.logs import MALFORMED, Log, as_line, check_source, first_words, name_of, read_row
from llama_ft.data.cleaning.pages import clean_pages
from llama_ft.data.cleaning.pieces import Pieces
from llama_ft.data.cleaning.report import CleanReport
from llama_ft.data.cleaning.turns import mend_order, notice
from llama_ft.data.examples import Conversation
from llama_ft.data.layouts.common import why_drop
from llama_ft.data.problems import Problems
from llama_ft.data.show import console
from llama_ft.data.sources import Source, open_sources
from llama_ft.errors import UserError
from llama_ft.files import write_json
from llama_ft.recipe.schema import Data, Layout

EVERY = 500
"""Rows between two reports of progress."""

Progress = Callable[[str, int], None]


def clean_files(
    paths: Sequence[Path],
    output: Path,
    *,
    layout: Layout | None = None,
    languages: Sequence[str] | None = ("en",),
    html: bool = True,
    dedupe: bool = True,
    max_tokens: int | None = None,
    tokenizer: str | None = None,
    template: str = "vicuna_v1.1",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CleanReport:
    """Cleans conversations into `output`, a .jsonl of ShareGPT rows, with a report `NAME.report.json` beside it.

    `layout`: sharegpt or messages; None guesses. `languages`: ISO 639 codes to keep; None keeps all. `max_tokens` needs
    `tokenizer`; lengths are those of a conversation in the form of `template`. A malformed row is dropped and counted.
    Raises :class:`UserError` for sources that cannot be read, most rows of a source malformed, an output that exists,
    or a library that a step needs.
    """
    check_output(output, paths, overwrite)
    sources = open_sources([Data(path=str(path), layout=layout) for path in paths], "source")
    for number, source in enumerate(sources):
        check_source(source, number)
    settings: dict[str, Any] = {
        "languages": None if languages is None else sorted(languages),
        "html": html,
        "dedupe": dedupe,
    }
    settings |= {"max_tokens": max_tokens, "tokenizer": tokenizer, "template": template if max_tokens else None}
    cleaner = _Cleaner(
        CleanReport([source.label for source in sources], output.name, settings),
        html=html,
        languages=None if languages is None else Languages(languages),
        copies=Copies() if dedupe else None,
        pieces=None if max_tokens is None else Pieces(max_tokens, tokenizer, template),
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the output cannot be written: {error.strerror or error}", where=str(output)) from error
    marked, aside = (output.with_name(f".{output.name}.{end}") for end in ("rows", "tmp"))
    try:
        with marked.open("w", encoding="utf-8") as file:
            for source in sources:
                cleaner.clean(source, file, progress)
        cleaner.settle(marked, aside)
        _refuse_nothing(cleaner.report)
        write_json(report_path(output), cleaner.report.as_dict())
        aside.replace(output)
    finally:
        marked.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)
    return cleaner.report


def report_path(output: Path) -> Path:
    """Where the report of a cleaned file stands."""
    return output.with_name(f"{output.stem}.report.json")


class _Cleaner:
    """The steps, with what they remember of the rows before."""

    def __init__(
        self,
        report: CleanReport,
        *,
        html: bool,
        languages: Languages | None,
        copies: Copies | None,
        pieces: Pieces | None,
    ):
        self.report = report
        self._html = html
        self._languages = languages
        self._copies = copies
        self._pieces = pieces

    def clean(self, source: Source, out: IO[str], progress: Progress | None) -> None:
        """Writes what is left of a source's rows, each line behind a JSON list that says whose it is."""
        problems, malformed = Problems(), Problems()
        rows = unread = 0
        for rows, (row, value) in enumerate(source.rows(problems), start=1):
            number, where = self.report.rows_in, source.where(row)
            self.report.rows_in += 1
            said = Problems()
            log, reason = read_row(source, row, value, said)
            if said:
                unread += 1
                malformed.take(said)
                self.report.note("reading", MALFORMED, "dropped", first_words(said))
            elif log is None or reason is not None:
                self.report.note("reading", str(reason), "dropped", where)
            else:
                name = name_of(value)
                lines, left_out = self._steps(number, where, name, name or f"{Path(source.label).stem}_{row}", log)
                for line in lines:
                    out.write(f"{json.dumps([number, where, len(lines), left_out])}\t{line}")
                    left_out = 0
            if progress is not None and rows % EVERY == 0:
                progress(source.label, rows)
        problems.raise_if_any()
        if 2 * unread > rows:
            malformed.raise_if_any()

    def settle(self, marked: Path, final: Path) -> None:
        """Takes the marks off the lines, and leaves out the rows that a longer state of theirs replaces."""
        superseded = self._copies.superseded if self._copies else set()
        told: set[int] = set()
        with marked.open(encoding="utf-8", newline="\n") as lines, final.open("w", encoding="utf-8") as out:
            for marked_line in lines:
                mark, line = marked_line.split("\t", 1)
                number, where, pieces, left_out = json.loads(mark)
                if number not in superseded:
                    out.write(line)
                    self.report.rows_out += 1
                    self.report.pieces += pieces > 1
                    self.report.exchanges_dropped += left_out
                elif number not in told:
                    told.add(number)
                    self.report.note("copies", SHORTER, "dropped", where)

    def _steps(self, number: int, where: str, name: str | None, shown: str, log: Log) -> tuple[list[str], int]:
        """(lines to write for one row, exchanges left out of them): none if a step drops it, several if it is split."""
        conversation, tools = log
        note = self.report.note
        if self._html:
            conversation, changed = clean_pages(conversation)
            if changed:
                note("HTML to markdown", "the page's HTML, buttons and counters", "changed", where)
        conversation, done, reason = mend_order(conversation)
        for rule in done if reason is None else ():
            note("order of turns", rule, "changed", where)
        verdicts = (
            ("order of turns", lambda: reason),
            ("empty turns", lambda: why_drop(conversation)),
            ("notices", lambda: notice(conversation)),
            ("language", lambda: self._other_language(conversation)),
            ("copies", lambda: self._copies.seen(number, name, conversation, tools) if self._copies else None),
        )
        for step, verdict in verdicts:
            dropped = verdict()
            if dropped is not None:
                note(step, dropped, "dropped", where)
                return [], 0
        if self._pieces is None:
            return [as_line(shown, conversation, tools)], 0
        pieces, left_out, reason = self._pieces.cut(conversation, tools)
        if reason is not None:
            note("splitting", reason, "dropped", where)
            return [], 0
        if len(pieces) > 1 or left_out:
            note("splitting", "split between exchanges", "changed", where)
        names = [f"{shown}_{part}" for part in range(len(pieces))] if len(pieces) > 1 else [shown]
        return [as_line(one, piece, tools) for one, piece in zip(names, pieces, strict=True)], left_out

    def _other_language(self, conversation: Conversation) -> str | None:
        other = self._languages.other(conversation) if self._languages else None
        if other is not None:
            self.report.languages[other] += 1
        return "another language" if other is not None else None


def print_clean_report(report: CleanReport, out: IO[str]) -> None:
    """The report, a line per rule that did something with the first rows it met, and what is left."""
    lines = [f"{report.rows_in:,} rows of {', '.join(report.sources)}"]
    for step in report.steps:
        first = "; ".join(step.first) + ("; …" if step.rows > len(step.first) else "")
        lines.append(f"  {step.rows:>7,} {step.effect}: {step.step}, {step.rule} ({first})")
    if report.languages:
        told = ", ".join(f"{code} {rows:,}" for code, rows in report.languages.most_common())
        lines.append(f"  languages dropped: {told}")
    if report.exchanges_dropped:
        lines.append(f"  {report.exchanges_dropped:>7,} exchanges left out: one alone is longer than max_tokens")
    pieces = f", {report.pieces:,} of them pieces of longer ones" if report.pieces else ""
    lines.append(f"{report.rows_in - report.dropped:,} rows kept, {report.dropped:,} dropped")
    lines.append(f"{report.rows_out:,} conversations written to {report.output}{pieces}")
    console(out).print(Text("\n".join(lines)))


def check_output(output: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Raises :class:`UserError` for an output that is no .jsonl, an input, a folder, or there already."""
    if output.suffix != ".jsonl":
        raise UserError(
            f"the output is a .jsonl, found {output.name}", key="output", hint=f"--output {output.stem}.jsonl"
        )
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise UserError(f"{output} is an input: it would be read while it is replaced", key="output")
    if output.is_dir():
        raise UserError(f"{output} is a folder", key="output", hint="name a file")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists", key="output", hint="another name, or --overwrite")


def _refuse_nothing(report: CleanReport) -> None:
    if report.rows_out:
        return
    told = ", ".join(f"{step.rows:,} {step.rule}" for step in report.steps if step.effect == "dropped")
    languages = ", ".join(f"{code} {n:,}" for code, n in report.languages.most_common(5))
    hint = f"languages found: {languages}; keep one with --language" if languages else "nothing was written"
    raise UserError(f"nothing is left of {report.rows_in:,} rows: {told}", hint=hint)
