"""One cold preparation: every source read, rendered, tokenised, checked and written; a holdout drawn if asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_ft.data.documents import OVERLONG, Document, read_documents
from llama_ft.data.preflight import DocumentChecks, check_template, conversation_key
from llama_ft.data.problems import Problems
from llama_ft.data.render import Renderer
from llama_ft.data.report import NO_DOCUMENTS, Fault, Report, SourceReport
from llama_ft.data.sources import Source
from llama_ft.data.store import DRAW_SCHEMA, SCHEMA, DocumentWriter, read_batches
from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Sequence

TRAIN, EVAL, CONVERSATIONS = "train.arrow", "eval.arrow", "eval.jsonl"
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Job:
    """What to prepare. `evaluation` is None (no evaluation), a share to hold out, or opened sources."""

    train: list[Source]
    evaluation: float | list[Source] | None
    renderer: Renderer
    sequence: Sequence
    seed: int

    @property
    def sources(self) -> list[Source]:
        """All sources: training, then evaluation."""
        return [*self.train, *(self.evaluation if isinstance(self.evaluation, list) else [])]


def build(job: Job, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Writes train.arrow (and eval.arrow, eval.jsonl) into `folder`; returns the report as plain data.

    Raises :class:`UserError` with all malformed rows of all sources; faults of good rows go into the report instead.
    """
    faults = check_template(job.renderer, job.sequence.train_on)
    run = _Run(job, folder, progress)
    if isinstance(job.evaluation, float):
        run.draw_holdout(job.evaluation)
    else:
        run.write(job.train, "train", TRAIN)
        if job.evaluation is not None:
            run.write_evaluation(job.evaluation)
    run.problems.raise_if_any()
    changed = [source.label for source in job.sources if not source.unchanged()]
    if changed:
        raise UserError([Problem("the file changed while it was read", label, hint="start again") for label in changed])
    report = Report(run.reports, [*faults, *run.checks.faults(), *run.no_documents()])
    return {"report": asdict(report)}


class _Run:
    def __init__(self, job: Job, folder: Path, progress: Progress | None):
        self.job, self.folder, self.progress = job, folder, progress
        self.problems = Problems()
        self.checks = DocumentChecks(job.renderer, job.sequence.train_on)
        self.reports: list[SourceReport] = []

    def documents(self, sources: list[Source], role: str, keep: Callable[[Document, int, SourceReport], None]) -> None:
        """Reads all sources: counts what is dropped, hands each kept document and its source's number to `keep`."""
        for number, source in enumerate(sources):
            counts = SourceReport(source.label, role)
            self.reports.append(counts)
            for document in read_documents(source, self.job.renderer, self.job.sequence, self.problems):
                counts.rows += 1
                if self.progress is not None and counts.rows % 500 == 0:
                    self.progress(source.label, counts.rows)
                if document.dropped is not None:
                    counts.drop(document.dropped, document.row)
                    continue
                self.checks.look(document, source)
                counts.truncated += document.truncated
                keep(document, number, counts)
            if self.progress is not None:
                self.progress(source.label, counts.rows)

    def write(self, sources: list[Source], role: str, name: str) -> None:
        """Training sources straight to their file."""
        compared = isinstance(self.job.evaluation, list)
        with DocumentWriter(self.folder / name) as writer:

            def keep(document: Document, number: int, counts: SourceReport) -> None:
                if compared:
                    self.checks.train(conversation_key(document.conversation))
                _count(counts, len(document.ids), document.labelled)
                writer.add(document, number)

            self.documents(sources, role, keep)

    def write_evaluation(self, sources: list[Source]) -> None:
        """Evaluation sources to their file, their conversations beside it."""
        with DocumentWriter(self.folder / EVAL) as writer, (self.folder / CONVERSATIONS).open("w") as spoken:

            def keep(document: Document, number: int, counts: SourceReport) -> None:
                self.checks.evaluate(conversation_key(document.conversation), sources[number].where(document.row))
                _count(counts, len(document.ids), document.labelled)
                writer.add(document, number)
                spoken.write(json.dumps(document.conversation) + "\n")

            self.documents(sources, "eval", keep)

    def draw_holdout(self, share: float) -> None:
        """Holds out the `share` of documents whose keyed hash is smallest, at least one.

        The draw depends on the seed and on what a document says, not on its place: the order of rows does not matter,
        and copies of a held-out conversation are held out with it, so none of them is trained on.
        """
        candidates = self.folder / "candidates.arrow"
        draws: list[bytes] = []
        with DocumentWriter(candidates, DRAW_SCHEMA) as writer:

            def keep(document: Document, number: int, counts: SourceReport) -> None:
                draws.append(conversation_key(document.conversation, self.job.seed))
                writer.add(document, number, draws[-1])

            self.documents(self.job.train, "train", keep)
        if draws and not self.problems:
            wanted = max(1, round(share * len(draws)))
            limit = sorted(draws)[wanted - 1]
            if all(draw <= limit for draw in draws):
                what = f"holding out {share:g} of {len(draws)} documents leaves none to train on"
                raise UserError(what, key="eval_data.holdout", hint="hold out less, or use more rows")
            self._split(candidates, limit)
        else:
            for name in (TRAIN, EVAL):
                DocumentWriter(self.folder / name).__exit__()
            (self.folder / CONVERSATIONS).touch()
        candidates.unlink()

    def _split(self, candidates: Path, limit: bytes) -> None:
        with (
            DocumentWriter(self.folder / TRAIN, SCHEMA) as train,
            DocumentWriter(self.folder / EVAL, SCHEMA) as held_out,
            (self.folder / CONVERSATIONS).open("w") as spoken,
        ):
            for batch in read_batches(candidates):
                mask = np.array([draw.as_py() <= limit for draw in batch["draw"]])
                for is_held, number, length, labelled, messages in zip(
                    mask,
                    *(batch[name].to_pylist() for name in ("source", "length", "labelled", "messages")),
                    strict=True,
                ):
                    if is_held:
                        self.reports[number].held_out += 1
                        spoken.write(messages + "\n")
                    else:
                        _count(self.reports[number], length, labelled)
                train.add_batch(batch.filter(~mask))
                held_out.add_batch(batch.filter(mask))

    def no_documents(self) -> list[Fault]:
        """Nothing left on a side that the recipe asks for."""
        faults = []
        for role in dict.fromkeys(counts.role for counts in self.reports):
            counts = [one for one in self.reports if one.role == role]
            if sum(one.kept for one in counts):
                continue
            rows = sum(one.rows for one in counts)
            reasons: dict[str, int] = {}
            for one in counts:
                for reason, n in one.dropped.items():
                    reasons[reason] = reasons.get(reason, 0) + n
            listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
            what = f"no {role} documents are left: all {rows:,} rows were dropped ({listed})"
            hint = "raise sequence.max_length" if OVERLONG in reasons else "llama-ft preview shows the rows"
            faults.append(Fault(NO_DOCUMENTS, what, counts[0].label, hint))
        return faults


def _count(counts: SourceReport, length: int, labelled: int) -> None:
    counts.kept += 1
    counts.tokens += length
    counts.labelled += labelled
    counts.longest = max(counts.longest, length)
