"""Documents made while training, for sets that do not fit on the disk: read, rendered and shuffled as they come.

Every pass over the stream is a function of the recipe and the pass's number, so every process sees the same order and
a resumed run finds its place by counting. Memory holds the shuffle buffer and one chunk per source, whatever the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from llama_ft.data.benchmarks import Leak
from llama_ft.data.chunks import ChunkMaker
from llama_ft.data.documents import in_chunks
from llama_ft.data.mixture import interleaved, shuffled
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Mixture

SAMPLE = 1000
"""Rows of every source that are prepared and checked before training starts; the others are checked as they come."""
CHUNK = 100
"""Rows rendered at once: small, so that the first step does not wait for a thousand rows of every source."""


@dataclass
class DocumentStream:
    """An endless stream of documents `{"input_ids", "labels"}` (int32 [tokens]) with `source`, `row` and `part`.

    Picklable.
    `weights`: how often a source is drawn from, relative to the others. `shares`: of all tokens, in place of weights,
    for :class:`llama_ft.data.shares.SharedStream`. `allowed`: preflight faults that were accepted.
    """

    maker: ChunkMaker
    sources: list[Source]
    weights: list[float]
    mixture: Mixture
    seed: int
    shares: tuple[float, ...] | None = None
    allowed: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Pass after pass. Raises :class:`UserError` at the first malformed row, and for sources that give nothing."""
        for number in count():
            yield from _some(self.one_pass(number), self.sources[0])

    def one_pass(self, number: int) -> Iterator[dict[str, Any]]:
        """Every document once (of a source with weight 0 none), in the order of pass `number`."""
        used = [i for i, weight in enumerate(self.weights) if weight]
        streams = [self.documents_of(i) for i in used]
        mixed = interleaved(streams, [self.weights[i] for i in used], self.seed, number)
        yield from shuffled(mixed, self.mixture.shuffle_buffer, self.seed, number)

    def documents_of(self, number: int, first: int = 0) -> Iterator[dict[str, Any]]:
        """The documents of a source in file order, from row `first` on; the rows before it are read over."""
        source, problems = self.sources[number], Problems()
        for rows_of_chunk in in_chunks(source, problems, CHUNK, first):
            chunk = self.maker.make(source, number, rows_of_chunk)
            problems.take(chunk.problems)
            problems.raise_if_any()
            for name, (_, row, detail) in chunk.faults.items():
                self._stop(name, source.where(row), detail)
            columns = (chunk.batch[name].to_pylist() for name in ("overlaps", "row", "part"))
            ids, labels = (chunk.batch[name].to_numpy(zero_copy_only=False) for name in ("input_ids", "labels"))
            for one_ids, one_labels, overlaps, row, part in zip(ids, labels, *columns, strict=True):
                if overlaps and self.mixture.decontaminate:
                    continue
                if overlaps:
                    leak = Leak.read(overlaps)
                    self._stop(f"{leak.kind}-in-train", source.where(row), leak.where)
                # Copies: a view would keep its whole chunk alive in the shuffle buffer.
                own = {"source": number, "row": row, "part": part}
                yield {"input_ids": one_ids.copy(), "labels": one_labels.copy(), **own}
        problems.raise_if_any()
        if not source.unchanged():
            raise UserError(
                "the file changed while it was read", where=source.label, hint="start again with --overwrite"
            )

    def _stop(self, name: str, where: str, detail: str) -> None:
        """A fault that the sample did not show stops the run, unless it was accepted by name."""
        if name not in self.allowed:
            what = f"preflight fault {name}{f': {detail}' if detail else ''}"
            raise UserError(what, where=where, hint=f"accept it with --allow {name}; training goes on with --resume")


def no_documents(source: Source) -> UserError:
    """The error for a source of which a whole pass gives nothing."""
    hint = "llama-ft preview shows its rows"
    return UserError("the stream holds no documents", where=source.label, hint=hint)


def _some(documents: Iterator[dict[str, Any]], source: Source) -> Iterator[dict[str, Any]]:
    """The documents of a pass; one without any would come again and again."""
    first = next(documents, None)
    if first is None:
        raise no_documents(source)
    yield first
    yield from documents
