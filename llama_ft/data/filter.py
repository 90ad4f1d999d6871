"""Files of raw text through quality steps, into one file: what `llama-ft data filter` runs.

Rows are read and written one at a time, and judged in several processes; with the same steps a recipe's source is
judged in preparation and in a stream. Copies are looked for last, across all sources, by this process alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast, get_args

import numpy as np

from llama_ft.data.clean import check_output, report_path
from llama_ft.data.copies import CopyIndex
from llama_ft.data.file_rows import FileRows
from llama_ft.data.filter_report import FilterReport
from llama_ft.data.filter_rows import READING, Judged, JudgedRows, RowJudge
from llama_ft.data.problems import Problems
from llama_ft.data.python_code import PythonRows
from llama_ft.data.quality.steps import CODE, PROSE, Quality
from llama_ft.data.reading.kinds import CODE as CODE_FILES
from llama_ft.data.reading.kinds import PACKED
from llama_ft.data.sources import Source, open_sources
from llama_ft.data.workers import Workers
from llama_ft.errors import UserError, did_you_mean
from llama_ft.files import write_json
from llama_ft.recipe.schema import Data, QualityStep

COPIES = {"duplicates": "exact", "near-duplicates": "near"}
"""Steps that compare a row with all rows before it -> how."""
STEPS = (*get_args(QualityStep), *COPIES)
"""All that `steps` can name."""
EQUAL, NEAR = "copy of an earlier row", "near copy of an earlier row"

Progress = Callable[[str, int], None]


def filter_files(
    entries: Sequence[Data],
    output: Path,
    *,
    steps: Sequence[str] | None = None,
    languages: Sequence[str] = ("en",),
    similarity: float = 0.8,
    dropped: Path | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FilterReport:
    """Filters sources of text into `output`, a .jsonl of `{"text", …}`, with a report `NAME.report.json` beside it.

    `steps`: those of :data:`STEPS`, for every source; None takes what suits each, and near-duplicates. `similarity`: as
    in a recipe's `mixture`. `dropped`: a .jsonl for the rows that are left out, each with its reason. `processes`: how
    many at the most, None for one per core; they do not change the result. Raises :class:`UserError` for sources that
    cannot be read or are no text, most rows of a source malformed, an output that exists, or where nothing is left.
    """
    paths = [Path(entry.path) for entry in entries if entry.path is not None]
    for path in (output, dropped):
        if path is not None:
            check_output(path, paths, overwrite)
    if output == dropped:
        raise UserError("the rows that stay and those that go cannot share a file", key="dropped")
    named = None if steps is None else _known(steps)
    if not 0 < similarity <= 1:
        raise UserError(f"{similarity:g} is no similarity", key="similarity", hint="a number above 0, up to 1")
    sources = [_with_steps(source, named, tuple(languages)) for source in open_sources(list(entries), "source")]
    copies = _copies(named)
    run = _Run(_report(sources, output, named, languages, similarity), copies, similarity)
    outputs = [path for path in (output, dropped) if path is not None]
    asides = [path.with_name(f".{path.name}.tmp") for path in outputs]
    try:
        with ExitStack() as stack, Workers(RowJudge(COPIES.get(copies or "")), sources, processes) as workers:
            files = [stack.enter_context(_opened(path)) for path in asides]
            for number, source in enumerate(sources):
                run.filter(source, number, workers, files, progress)
        _refuse_nothing(run.report)
        write_json(report_path(output), run.report.as_dict())
        for aside, path in zip(asides, outputs, strict=True):
            aside.replace(path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)
    return run.report


class _Run:
    """The report so far, and the rows that others are compared with."""

    def __init__(self, report: FilterReport, copies: str | None, similarity: float):
        self.report = report
        self._step = copies
        self._index: CopyIndex[tuple[bytes, str]] | None = None
        if copies is not None:
            self._index = CopyIndex("near" if copies == "near-duplicates" else "exact", similarity)

    def filter(
        self,
        source: Source,
        number: int,
        workers: Workers[JudgedRows],
        files: list[IO[str]],
        progress: Progress | None,
    ) -> None:
        """Writes what is left of a source's rows to the first of `files`, the others to the second, if there is one."""
        problems, malformed, rows = Problems(), Problems(), 0
        for chunk in workers.chunks(number, problems):
            malformed.take(chunk.malformed)
            rows += len(chunk.rows)
            for one in chunk.rows:
                row = self._count(self._compared(one), source)
                if row.step is None:
                    files[0].write(row.line)
                elif len(files) > 1 and row.line:
                    files[1].write(_with_reason(row))
            if progress is not None:
                progress(source.label, rows)
        problems.raise_if_any()
        if 2 * malformed.count > rows:
            malformed.raise_if_any()

    def _compared(self, row: Judged) -> Judged:
        """The row, dropped if it copies one that stays."""
        if row.step is not None or self._index is None:
            return row
        numbers = None if row.signature is None else np.frombuffer(row.signature, dtype=np.uint64)
        original = self._index.add(row.key, numbers, (row.key, row.where))
        if original is None:
            return row
        rule = EQUAL if original[0] == row.key else NEAR
        return replace(row, step=self._step, rule=rule, begins=f"of {original[1]}: {row.begins}")

    def _count(self, row: Judged, source: Source) -> Judged:
        report = self.report
        report.rows_in += 1
        report.characters_in += row.read
        for step in (READING, *report.steps[source.label]):
            report.seen[step] += 1
            if step == row.step:
                report.note(step, str(row.rule), "dropped", row.where, row.begins)
                return row
        for change in row.changed:
            step, _, rule = change.partition(": ")
            report.note(step, rule, "changed", row.where, row.begins)
        report.rows_out += 1
        report.characters_out += row.size
        return row


def is_code(source: Source) -> bool:
    """Whether a source holds files of code: by what it is, or by its files' names; of rows in a .jsonl nobody knows."""
    if isinstance(source.origin, PythonRows):
        return source.origin.what == "files"
    if not isinstance(source.origin, FileRows):
        return False
    names = [path.with_suffix("") if path.suffix in PACKED else path for path in source.origin.found.files]
    return 2 * sum(path.suffix.lower() in CODE_FILES for path in names) > len(names)


def _known(steps: Sequence[str]) -> list[str]:
    for step in steps:
        if step not in STEPS:
            raise UserError(f"no such step '{step}'", key="steps", hint=did_you_mean(step, STEPS, kind="steps"))
    if len(set(steps)) < len(steps):
        raise UserError("a step is named twice", key="steps", hint="name each once")
    if len(COPIES.keys() & steps) > 1:
        what = "near-duplicates looks for equal rows, too"
        raise UserError(what, key="steps", hint="name one of duplicates and near-duplicates")
    if not steps:
        raise UserError("no step is named", key="steps", hint=f"name some of {', '.join(STEPS)}")
    return list(steps)


def _copies(named: list[str] | None) -> str | None:
    return "near-duplicates" if named is None else next((step for step in named if step in COPIES), None)


def _with_steps(source: Source, named: list[str] | None, languages: tuple[str, ...]) -> Source:
    if source.layout != "text":
        hint = "llama-ft data clean is for conversations" if source.layout in ("sharegpt", "messages") else None
        raise UserError(f"its rows have the {source.layout} layout; text is filtered", where=source.label, hint=hint)
    steps = (CODE if is_code(source) else PROSE) if named is None else [step for step in named if step not in COPIES]
    quality = Quality(cast(tuple[QualityStep, ...], tuple(steps)), languages)
    quality.check("language")
    return replace(source, quality=quality)


def _report(
    sources: list[Source], output: Path, named: list[str] | None, languages: Sequence[str], similarity: float
) -> FilterReport:
    last = [copies] if (copies := _copies(named)) is not None else []
    steps = {source.label: [*(source.quality.steps if source.quality else ()), *last] for source in sources}
    used = {step for one in steps.values() for step in one}
    order = [*(step for step in named or [*PROSE, *CODE] if step in used and step not in COPIES), *last]
    settings: dict[str, Any] = {"steps": named, "languages": sorted(languages), "similarity": similarity}
    labels = [source.label for source in sources]
    return FilterReport(labels, steps, output.name, settings, seen=dict.fromkeys([READING, *order], 0))


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        what = f"the output cannot be written: {error.strerror or error}"
        raise UserError(what, where=str(path.with_name(path.name.removeprefix(".").removesuffix(".tmp")))) from error


def _with_reason(row: Judged) -> str:
    return json.dumps({**json.loads(row.line), "dropped": f"{row.step}: {row.rule}"}, ensure_ascii=False) + "\n"


def _refuse_nothing(report: FilterReport) -> None:
    if report.rows_out:
        return
    rules = sorted((one for one in report.rules if one.effect == "dropped"), key=lambda one: -one.rows)
    told = ", ".join(f"{one.rows:,} {one.step}: {one.rule}" for one in rules[:5])
    hint = "nothing was written; other steps: --steps, other languages: --language"
    raise UserError(f"nothing is left of {report.rows_in:,} rows: {told or 'there were none'}", hint=hint)
