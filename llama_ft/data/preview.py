"""`llama-ft preview`: what the model will see, document by document, before anything is paid for.

On a terminal, tokens are coloured by loss; without one, labelled text stands between ⟦ and ⟧. With `--json` each
document is one line on stdout, which then holds those lines alone: everything else goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llama_ft.errors import UserError

if TYPE_CHECKING:
    from llama_ft.data.documents import Document
    from llama_ft.data.prepare import Prepared
    from llama_ft.data.sources import Source
    from llama_ft.recipe.schema import Recipe

SHOWN = 5
"""Documents shown on a terminal when no limit is given; `--json` without a limit writes all of them."""


def preview_recipe(
    path: str, overrides: list[str], *, limit: int | None = None, as_json: bool = False, html: Path | None = None
) -> None:
    """Shows the first `limit` rows of a recipe's training data as documents, dropped ones included, and the report.

    With `as_json`, one line per document on stdout: `{"row", "input_ids", "labels", "text", "dropped"}`, in file
    order; `dropped` is the reason or null, and a row that was dropped before it was tokenised has empty lists. A pair
    also has `rejected`, the prompt with the worse answer (`input_ids`, `labels`, `text`), and `shared`, the number of
    tokens at the start that are computed once for both. A held-out document is shown like any other. With `html`, a
    page is written there instead. Preflight faults are reported, they do not raise.

    Raises :class:`UserError` for a recipe or a data file that cannot be read.
    """
    if as_json and html is not None:
        raise UserError("--json and --html contradict each other", hint="give one of them")
    with _lines_alone() if as_json else _terminal() as out:
        from llama_ft.recipe import load_recipe

        recipe = load_recipe(path, overrides)
        preview(recipe, out, limit=limit, as_json=as_json, html=html)


def preview(
    recipe: Recipe, out: IO[str], *, limit: int | None = None, as_json: bool = False, html: Path | None = None
) -> None:
    """The same for a loaded recipe, written to `out`."""
    from llama_ft.data.prepare import inspect_data
    from llama_ft.data.show import rows_line

    # The whole set first: a malformed row anywhere must be said before the first document is shown as fine.
    with rows_line() as progress:
        prepared = inspect_data(recipe, progress=progress)
    documents = read_training(prepared)
    if html is not None:
        from llama_ft.data.page.gather import write_preview_page

        write_preview_page(html, recipe, prepared, limit=limit)
        _print_report(prepared.report, out)
        print(f"{html} is written: open it in a browser", file=out)
    elif as_json:
        for document, _ in islice(documents, limit):
            out.write(json.dumps(_as_line(document)) + "\n")  # ASCII: readers split lines at U+2028 as well
        out.flush()
        _print_report(prepared.report, sys.stderr)
    else:
        from llama_ft.data.show import print_document, print_legend

        end = prepared.template.end_token_id(prepared.tokenizer)
        print_legend(out)
        for document, source in islice(documents, limit or SHOWN):
            print_document(document, source.label, end, out)
        _print_report(prepared.report, out)


def read_training(prepared: Prepared) -> Iterator[tuple[Document, Source]]:
    """Every row of the training sources as a document, dropped ones included, with its source."""
    from llama_ft.data.documents import read_documents
    from llama_ft.data.problems import Problems

    problems, maker, set_aside = Problems(), prepared.job.maker, prepared.set_aside
    for number, source in enumerate(prepared.job.train):
        for document in read_documents(source, maker, problems):
            reason = set_aside.get((number, document.row, document.part))
            yield (replace(document, dropped=reason) if reason else document), source
        problems.raise_if_any()


def _as_line(document: Document) -> dict[str, object]:
    line: dict[str, object] = {
        "row": document.row,
        "input_ids": document.ids.tolist(),
        "labels": document.labels.tolist(),
        "text": document.text,
        "dropped": document.dropped,
    }
    if document.rejected is not None:
        worse = document.rejected
        line["rejected"] = {"input_ids": worse.ids.tolist(), "labels": worse.labels.tolist(), "text": worse.text}
        line["shared"] = document.shared
    return line


def _print_report(report: object, out: IO[str]) -> None:
    from llama_ft.data.report import Report
    from llama_ft.data.show import print_report

    assert isinstance(report, Report)
    print_report(report, out)


@contextmanager
def _terminal() -> Iterator[IO[str]]:
    """Standard output that survives a `| head` and any encoding."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    with _quiet_pipe():
        yield sys.stdout


@contextmanager
def _lines_alone() -> Iterator[IO[str]]:
    """The real standard output as a UTF-8 stream, while everybody else's prints, C libraries' too, go to stderr."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by an object without a file, as in an embedding program
        number = -1
    if number < 0:
        out = sys.stdout
        with redirect_stdout(sys.stderr):
            yield out
        return
    sys.stdout.flush()
    # C libraries write to descriptor 1, whatever Python calls its standard output.
    kept = {descriptor: os.dup(descriptor) for descriptor in {1, number}}
    for descriptor in kept:
        os.dup2(2, descriptor)
    try:
        with _quiet_pipe(), os.fdopen(os.dup(kept[number]), "w", encoding="utf-8", newline="\n") as out:
            yield out
    finally:
        sys.stdout.flush()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)
            os.close(original)


@contextmanager
def _quiet_pipe() -> Iterator[None]:
    """A reader that has seen enough (`| head`) is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this, the interpreter would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
