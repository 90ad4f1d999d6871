"""Documents and reports as text for people, in colour on a terminal and plain elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_ft.data.documents import Document
from llama_ft.data.render import MASKED
from llama_ft.data.report import ALLOWABLE, Report, SourceReport

# Two shades in turn, so that neighbouring tokens can be told apart.
LABELLED = ("green", "bold green")
OMITTED = ("dim", "bright_black")
END = "bold black on green"
PLAIN_WIDTH = 100
COLUMNS = 4
"""Sources side by side in one table."""


# Line separators, and marks that reverse or isolate the direction of text: they would move what stands around them.
_INVISIBLE = {0x2028, 0x2029, 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the caller; rich would end the program with exit code 1."""
        raise BrokenPipeError


def console(out: IO[str], width: int = PLAIN_WIDTH) -> Console:
    """A console on `out`; without a terminal it neither colours nor wraps, and tables are `width` characters wide."""
    if out.isatty():
        return _Console(file=out, highlight=False)
    return _Console(file=out, highlight=False, color_system=None, width=width, soft_wrap=True)


@contextmanager
def rows_line(*, shown: bool = True) -> Iterator[Callable[[str, int], None] | None]:
    """Progress of long work on rows, on one line of the terminal, which is clean again at the end.

    Gives what to call with a source's name and its rows so far; None where nobody would see it.
    """
    if not shown or not sys.stderr.isatty():
        yield None
        return

    def say(text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield lambda label, rows: say(f"{rows:,} rows of {label}")
    finally:
        say("")


def print_legend(out: IO[str]) -> None:
    """Says how loss is shown."""
    screen = console(out)
    if screen.color_system is None:
        screen.print(Text("⟦text⟧ carries loss, other text is context; ↵ is a newline; ■ follows the end token\n"))
        return
    parts = [("carries loss", "green"), ("  context  ", "dim"), ("end token", END), ("  ↵ is a newline", "dim")]
    screen.print(Text.assemble(*parts), "\n")


def print_document(document: Document, label: str, end_token_id: int | None, out: IO[str]) -> None:
    """One document: a header with its row and counts, then its text, token by token. Of a pair what both share once."""
    screen = console(out)
    tokens, labelled = document.cost
    counts = f"{tokens:,} tokens, {labelled:,} labelled"
    if document.shared:
        counts = f"{tokens:,} tokens, {document.shared:,} of them for both answers, {labelled:,} labelled"
    if document.truncated:
        counts += ", truncated"
    if document.dropped:
        counts = f"dropped ({document.dropped}), {counts}"
    part = f", part {document.part}" if document.part else ""
    head = f"row {document.row}{part} of {label}: {counts}"
    screen.print(Text(head, style="bold red" if document.dropped else "bold"))
    if document.refusal is not None:
        screen.print(Text(f"the template says: {document.refusal}", style="red"))
    coloured = screen.color_system is not None
    if document.rejected is None:
        screen.print(_tokens(document, end_token_id, coloured=coloured))
    else:
        shared = document.shared
        if shared:
            screen.print(_tokens(document, end_token_id, slice(0, shared), coloured=coloured))
        for name, one in (("chosen", document), ("rejected", document.rejected)):
            screen.print(Text(f"{name}:", style="bold"))
            screen.print(_tokens(one, end_token_id, slice(shared, None), coloured=coloured))
    screen.print()


def _tokens(document: Document, end_token_id: int | None, part: slice = slice(None), *, coloured: bool) -> Text:
    """The text of a `part` of a document's tokens."""
    text = Text()
    if not len(document.ids):
        return Text(_visible(document.text), style="dim")
    done, inside = 0, False
    shown = range(*part.indices(len(document.ids)))
    for i, (start, end) in enumerate(document.offsets):
        piece = _visible(document.text[max(start, done) : end])  # bytes of one character share its offsets
        done = max(done, end)
        if i not in shown:
            continue
        labelled = bool(document.labels[i] != MASKED)
        is_end = labelled and int(document.ids[i]) == end_token_id
        if coloured:
            text.append(piece, style=END if is_end else (LABELLED if labelled else OMITTED)[i % 2])
            continue
        if labelled != inside:
            text.append("⟦" if labelled else "⟧")
            inside = labelled
        text.append(piece + ("■" if is_end else ""))
    if inside and not coloured:
        text.append("⟧")
    return text


def _visible(piece: str) -> str:
    """Newlines shown and kept; other control characters as their pictures, so that data cannot drive a terminal."""
    shown = []
    for char in piece:
        code = ord(char)
        if char == "\n":
            shown.append("↵\n")
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif 0x7F <= code < 0xA0 or code in _INVISIBLE:
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(char)
    return "".join(shown)


def print_report(report: Report, out: IO[str]) -> None:
    """The table of sources, the dropped rows with reasons, the faults."""
    screen = console(out)
    if report.sampled:
        screen.print(Text(f"streamed: the counts are of the first {report.sampled:,} rows of each source", "yellow"))
    for first in range(0, len(report.sources), COLUMNS):
        screen.print(_table(report.sources[first : first + COLUMNS]))
    for counts in report.sources:
        for reason, number in counts.dropped.items():
            rows = ", ".join(map(str, counts.examples[reason]))
            more = ", …" if number > len(counts.examples[reason]) else ""
            screen.print(Text(f"dropped from {counts.label}: {number:,} {reason} (row {rows}{more})"))
        for note, number in counts.notes.items():
            screen.print(Text(f"changed in {counts.label}: {number:,} {note}"))
        if counts.duplicates and not any("copy" in reason for reason in counts.dropped):
            hint = "mixture: {dedupe: exact} drops them"
            screen.print(
                Text(f"repeated in {counts.label}: {counts.duplicates:,} copies of earlier rows, kept; {hint}")
            )
        if counts.guessed:
            screen.print(Text(f"{counts.label}: {counts.guessed}", style="yellow"))
    for name, share in report.efficiency.items():
        screen.print(Text(f"{name}: {share:.1%}"))
    for fault in report.faults:
        place = f"{fault.where}: " if fault.where else ""
        hint = f" — {fault.hint}" if fault.hint else ""
        screen.print(Text(f"preflight fault {fault.name}: {place}{fault.what}{hint}", style="bold red"))
    if report.faults:
        names = [f"--allow {fault.name}" for fault in report.faults if fault.name in ALLOWABLE]
        accept = f" unless accepted by name ({', '.join(names)})" if names else ""
        screen.print(Text(f"training will not start{accept}", style="red"))


def _table(sources: list[SourceReport]) -> Table:
    """One column per source, so that a narrow terminal shows whole numbers."""
    table = Table("")
    for one in sources:
        table.add_column(Text(one.label.rsplit("/", 1)[-1]), justify="right", overflow="fold")
    lines: dict[str, list[str]] = {
        "for": [one.role for one in sources],
        "rows": [f"{one.rows:,}" for one in sources],
        "kept": [f"{one.kept:,}" for one in sources],
        "held out": [f"{one.held_out:,}" for one in sources],
        "dropped": [f"{sum(one.dropped.values()):,}" for one in sources],
        "truncated": [f"{one.truncated:,}" for one in sources],
        "tokens": [f"{one.tokens:,}" for one in sources],
        "labelled": [f"{one.labelled:,} ({_share(one)})" for one in sources],
        "longest": [f"{one.longest:,}" for one in sources],
    }
    if any(one.parts for one in sources):
        lines["of them later parts"] = [f"{one.parts:,}" for one in sources]
    if any(one.role == "train" and (one.drawn != one.kept or one.share < 1) for one in sources):
        lines["per pass"] = [f"{one.drawn:,}" if one.role == "train" else "" for one in sources]
        lines["share"] = [f"{one.share:.1%}" if one.role == "train" else "" for one in sources]
        lines["seen per pass"] = [f"{one.repeats:.2f}×" if one.role == "train" else "" for one in sources]
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table


def _share(counts: SourceReport) -> str:
    return f"{counts.labelled / counts.tokens:.0%}" if counts.tokens else "–"
