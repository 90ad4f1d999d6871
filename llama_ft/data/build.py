"""One cold preparation: every source read, rendered, tokenised, checked and written; a holdout drawn if asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llama_ft.data.benchmarks import Leak, overlap_indexes
from llama_ft.data.chunks import MESSAGES, Chunk, ChunkMaker, schema_of
from llama_ft.data.copies import CopyIndex
from llama_ft.data.documents import DocumentMaker
from llama_ft.data.preflight import Findings, check_template
from llama_ft.data.problems import Problems
from llama_ft.data.render import Renderer
from llama_ft.data.report import Report, SourceReport
from llama_ft.data.sources import Source
from llama_ft.data.store import DocumentWriter, read_batches
from llama_ft.data.workers import Workers
from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Infilling, Mixture, Sequence

TRAIN, EVAL, CONVERSATIONS, SET_ASIDE = "train.arrow", "eval.arrow", "eval.jsonl", "set_aside.json"
COPY = "copy of an earlier document"
NEAR_COPY = "near copy of an earlier document"
LEAKED = {"benchmark": "holds a prompt of a benchmark", "eval": "overlaps a held-out row"}
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Job:
    """What to prepare. `evaluation` is None (no evaluation), a share to hold out, or opened sources.

    `vocabulary`: rows of the embedding that will be trained, if known. `benchmarks`: opened sources of prompts.
    `keep_messages`: documents also say what was said in them, for objectives that ask their questions again.
    """

    train: list[Source]
    evaluation: float | list[Source] | None
    renderer: Renderer
    sequence: Sequence
    seed: int
    mixture: Mixture = field(default_factory=Mixture)
    infilling: Infilling | None = None
    benchmarks: list[Source] = field(default_factory=list)
    vocabulary: int | None = None
    keep_messages: bool = False

    @property
    def sources(self) -> list[Source]:
        """All sources whose documents are used: training, then evaluation."""
        return [*self.train, *self.held_out]

    @property
    def held_out(self) -> list[Source]:
        """The sources that are evaluated on."""
        return self.evaluation if isinstance(self.evaluation, list) else []

    @property
    def maker(self) -> DocumentMaker:
        """What turns their rows into documents."""
        return DocumentMaker(self.renderer, self.sequence, self.infilling, self.seed)


def build(job: Job, folder: Path, progress: Progress | None = None, processes: int | None = None) -> dict[str, Any]:
    """Writes train.arrow (and eval.arrow, eval.jsonl) into `folder`; returns the report as plain data.

    Raises :class:`UserError` with all malformed rows of all sources; faults of good rows go into the report instead.
    """
    speaks = any(source.layout != "text" for source in job.sources)  # text is written without the template
    findings = Findings(check_template(job.renderer, job.sequence.train_on) if speaks else [], job)
    run = _Run(job, folder, findings, progress)
    chunks = ChunkMaker(
        job.maker,
        job.sequence.train_on,
        job.seed,
        job.vocabulary,
        near=job.mixture.dedupe == "near",
        keep_messages=job.keep_messages or job.evaluation is not None,
        asked=job.keep_messages,
        overlaps=overlap_indexes(job.benchmarks, job.held_out, decontaminate=job.mixture.decontaminate),
    )
    with Workers(chunks, job.sources, processes) as workers:
        run.evaluate(workers)
        run.train(workers)
    run.problems.raise_if_any()
    changed = [source.label for source in job.sources if not source.unchanged()]
    if changed:
        raise UserError([Problem("the file changed while it was read", label, hint="start again") for label in changed])
    (folder / SET_ASIDE).write_text(json.dumps(run.set_aside), encoding="utf-8")
    return {"report": asdict(Report(run.reports, findings.faults(run.reports)))}


class _Run:
    def __init__(self, job: Job, folder: Path, findings: Findings, progress: Progress | None):
        self.job, self.folder, self.findings, self.progress = job, folder, findings, progress
        self.problems = Problems()
        roles = ["train"] * len(job.train) + ["eval"] * (len(job.sources) - len(job.train))
        pairs = zip(job.sources, roles, strict=True)
        self.reports = [SourceReport(source.label, role, guessed=source.guessed) for source, role in pairs]
        self.set_aside: list[tuple[int, int, int, str]] = []
        self.held_out: dict[bytes, str] = {}
        self.fates: dict[tuple[int, int], str] = {}  # of the last row that copied another: why it is dropped
        # Equal copies are counted in any case; a document's key says which one it is.
        near = job.mixture.dedupe == "near"
        self.copies: CopyIndex[bytes] = CopyIndex("near" if near else "exact", job.mixture.similarity)

    def chunks(self, workers: Workers[Chunk], number: int) -> Iterator[Chunk]:
        """The chunks of a source, with what they say of themselves counted."""
        report, of_file = self.reports[number], Problems()
        for chunk in workers.chunks(number, of_file):
            self.problems.take(chunk.problems)
            report.rows += chunk.rows
            for reason, row in chunk.dropped:
                report.drop(reason, row)
            for note, count in chunk.notes.items():
                report.notes[note] = report.notes.get(note, 0) + count
            self.findings.look(chunk, self.job.sources[number])
            if self.progress is not None:
                self.progress(report.label, report.rows)
            if not self.problems and not of_file:
                yield chunk
        self.problems.take(of_file)

    def evaluate(self, workers: Workers[Chunk]) -> None:
        """Evaluation sources to their file, their conversations beside it; what they say is remembered."""
        if not isinstance(self.job.evaluation, list):
            return
        schema = schema_of(self.job.evaluation, messages=self.job.keep_messages)
        with DocumentWriter(self.folder / EVAL, schema) as writer, (self.folder / CONVERSATIONS).open("w") as spoken:
            for place, source in enumerate(self.job.evaluation):
                number = len(self.job.train) + place
                for chunk in self.chunks(workers, number):
                    for key, row in zip(*_columns(chunk.batch, "key", "row"), strict=True):
                        self.held_out.setdefault(key, source.where(row))
                    self._keep(_of_its_list(chunk.batch, place), self.reports[number], writer)
                    spoken.writelines(f"{messages}\n" for messages in chunk.batch["messages"].to_pylist())

    def train(self, workers: Workers[Chunk]) -> None:
        """Training sources to their file, or to candidates that a holdout is then drawn from."""
        share = self.job.evaluation if isinstance(self.job.evaluation, float) else None
        schema = schema_of(self.job.train, messages=self.job.keep_messages)
        if share is not None:
            schema = pa.schema([*schema, *(field for field in _DRAWN if field.name not in schema.names)])
        name = TRAIN if share is None else "candidates.arrow"
        with DocumentWriter(self.folder / name, schema) as writer:
            for number in range(len(self.job.train)):
                for chunk in self.chunks(workers, number):
                    batch = self._without_copies_and_leaks(chunk.batch, number)
                    if share is None:
                        self._keep(batch, self.reports[number], writer)
                    else:
                        writer.add(batch)
        if share is not None and not self.problems:
            self._draw_holdout(share, self.folder / name)
            (self.folder / name).unlink()

    def _without_copies_and_leaks(self, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
        """The documents that stay, of one chunk of training documents; the others are counted and remembered."""
        source, report, mixture = self.job.train[number], self.reports[number], self.job.mixture
        stays = np.ones(batch.num_rows, dtype=bool)
        names = ("key", "row", "part", "overlaps", "signature")
        for i, (key, row, part, overlaps, signature) in enumerate(zip(*_columns(batch, *names), strict=True)):
            reason = None
            leak = Leak.read(overlaps) if overlaps else None
            if key in self.held_out:
                leak = Leak("eval", self.held_out[key])
            if leak is not None:
                self.findings.leak(leak, source.where(row))
                reason = LEAKED[leak.kind] if mixture.decontaminate else None
            if part:  # a row is a copy as a whole; its parts share the fate of the first
                reason = reason or self.fates.get((number, row))
            elif reason is None:  # a row that is taken out is no original of others
                numbers = np.frombuffer(signature, dtype=np.uint64) if signature is not None else None
                copied = self.copies.add(key, numbers, key)
                report.duplicates += copied is not None
                if copied is not None and mixture.dedupe != "none":
                    reason = COPY if copied == key else NEAR_COPY
                    self.fates = {(number, row): reason}
            if reason is not None:
                stays[i] = False
                report.drop(reason, row)
                self.set_aside.append((number, row, part, reason))
        return batch.filter(pa.array(stays))

    def _draw_holdout(self, share: float, candidates: Path) -> None:
        """Holds out a `share` of the documents, those whose keyed hash is smallest, at least one.

        The draw depends on the seed and on what a row says, not on its place: the order of rows does not matter, and
        copies of a held-out conversation, or its parts, are held out with it, so none of them is trained on.
        """
        draws = Counter(draw for batch in read_batches(candidates) for draw in batch["draw"].to_pylist())
        chosen = _drawn(draws, share)
        if draws and len(chosen) == len(draws):
            what = f"holding out {share:g} of {draws.total()} documents leaves none to train on"
            raise UserError(what, key="eval_data.holdout", hint="hold out less, or use more rows")
        schema = schema_of(self.job.train, messages=self.job.keep_messages)
        with (
            DocumentWriter(self.folder / TRAIN, schema) as train,
            DocumentWriter(self.folder / EVAL, schema) as held_out,
            (self.folder / CONVERSATIONS).open("w") as spoken,
        ):
            for batch in read_batches(candidates):
                drawn = pa.array([draw in chosen for draw in batch["draw"].to_pylist()], pa.bool_())
                held = batch.filter(drawn)
                spoken.writelines(f"{messages}\n" for messages in held["messages"].to_pylist())
                held_out.add(held)
                if batch.num_rows:
                    report = self.reports[batch["source"][0].as_py()]  # a batch is of one source
                    report.held_out += held.num_rows
                    report.truncated += int(pc.sum(held["truncated"]).as_py() or 0)
                    self._keep(batch.filter(pc.invert(drawn)), report, train)

    def _keep(self, batch: pa.RecordBatch, report: SourceReport, writer: DocumentWriter) -> None:
        """Counts and writes documents of one source."""
        lengths = batch["length"].to_numpy()
        report.kept += batch.num_rows
        report.parts += int((batch["part"].to_numpy() > 0).sum())
        report.truncated += int(pc.sum(batch["truncated"]).as_py() or 0)
        report.tokens += int(lengths.sum())
        report.labelled += int(batch["labelled"].to_numpy().sum())
        report.longest = max(report.longest, int(lengths.max(initial=0)))
        writer.add(batch)


def _drawn(draws: Counter[bytes], share: float) -> set[bytes]:
    """Which draws are held out: in their order, but for a group that would take more than the share.

    A group is a conversation with its copies, or the parts of one text. At least one is held out, the smallest if all
    are too large.
    """
    wanted = max(1, round(share * draws.total()))
    chosen: set[bytes] = set()
    for draw in sorted(draws):
        if draws[draw] <= wanted:
            chosen.add(draw)
            wanted -= draws[draw]
        if not wanted:
            break
    return chosen or {min(draws, key=lambda draw: (draws[draw], draw))} if draws else set()


_DRAWN = (pa.field("draw", pa.binary(16)), pa.field("truncated", pa.bool_()), MESSAGES)


def _columns(batch: pa.RecordBatch, *names: str) -> list[list[Any]]:
    return [batch[name].to_pylist() for name in names]


def _of_its_list(batch: pa.RecordBatch, place: int) -> pa.RecordBatch:
    """`source` of an evaluation document is its place in `eval_data`, not among all sources."""
    at = batch.schema.get_field_index("source")
    return batch.set_column(at, "source", pa.array(np.full(batch.num_rows, place), pa.int32()))
