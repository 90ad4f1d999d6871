"""Rows of a source become documents, in file order: kept with ids and labels, or dropped with a reason.

A row gives one document; with `overlong: split`, a long one gives several parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from llama_ft.data.copies import text_key
from llama_ft.data.examples import Conversation, Example
from llama_ft.data.infilling import Infiller
from llama_ft.data.layouts import read_example, with_system
from llama_ft.data.problems import Problems
from llama_ft.data.render import Encoded, Rendered, Renderer, Span, TemplateRefusal
from llama_ft.data.shared import in_common, labelled_of
from llama_ft.data.sources import Source
from llama_ft.data.split import split_conversation, split_tokens
from llama_ft.data.template import Template
from llama_ft.recipe.schema import Infilling
from llama_ft.recipe.schema import Sequence as Limits

CHUNK = 1000
"""Rows tokenised in one call: enough to keep all cores busy, small enough to keep memory flat."""
CHUNK_CHARACTERS = 4_000_000
"""A chunk of long rows ends earlier: with the row that takes it past so many characters."""

Row = tuple[int, str, Any]
"""A row's number in its source, its place as messages name it, its value."""

OVERLONG = "longer than max_length"
EXCHANGE_OVERLONG = "one exchange longer than max_length"
NO_LABEL = "no label left after truncation"
NOTHING_LABELLED = "no labelled token"
SAME_TOKENS = "chosen and rejected are the same tokens"
SAME_WHEN_CUT = "chosen equals rejected within max_length"
REFUSED = "refused by the template"

# Text as pre-training writes it: BOS if the tokenizer begins texts with it, the text, the end token. SentencePiece
# LLaMAs begin a text with a space piece; after a written <s> that space must be written too.
_TEXT = Template(
    "text",
    "{{ bos_token }}{% if bos_token == '<s>' %}{{ ' ' }}{% endif %}"
    "{% generation %}{{ messages[0]['content'] + eos_token }}{% endgeneration %}",
)


@dataclass(frozen=True)
class Document:
    """One row's outcome, or a part of it. `ids`, `labels`: int32 [tokens], empty when dropped before tokenisation.

    `row` is the 0-based number in the source; `part` counts the parts of a row that was `split`, whose messages are in
    `piece`; `example` is the whole row. `dropped` is the reason, or None for a kept document; `refusal` the template's
    words if it refused the row; `closed` whether every answer ends with a labelled end token. `rejected` is the worse
    answer of a pair, a document of its own.
    """

    row: int
    example: Example
    text: str
    ids: np.ndarray
    labels: np.ndarray
    offsets: list[Span]
    part: int = 0
    piece: Conversation | None = None
    split: bool = False
    dropped: str | None = None
    refusal: str | None = None
    truncated: bool = False
    closed: bool = True
    rejected: Document | None = None

    @property
    def conversation(self) -> Conversation:
        """The messages, of text none."""
        return self.piece if self.piece is not None else self.example.messages

    @property
    def labelled(self) -> int:
        """Tokens that carry loss, of a pair in its better answer."""
        return labelled_of(self.labels)

    @cached_property
    def shared(self) -> int:
        """Of a pair, the tokens at its start that are computed once for both answers; else 0."""
        other = self.rejected
        return 0 if other is None else in_common(self.ids, self.labels, other.ids, other.labels)

    @property
    def cost(self) -> tuple[int, int]:
        """Tokens that a model computes for it, of a pair for both answers, and how many of them carry loss."""
        other = self.rejected
        if other is None:
            return len(self.ids), self.labelled
        return len(self.ids) + len(other.ids) - self.shared, self.labelled + other.labelled

    @property
    def own(self) -> Example:
        """What stands in this document of the row: all of it, or of a split row this part."""
        if self.piece is not None:
            return replace(self.example, messages=self.piece)
        return replace(self.example, text=self.text) if self.split else self.example

    @cached_property
    def key(self) -> bytes:
        """16 bytes that are equal for documents of rows that teach the same; parts of a row share it."""
        return text_key(self.example.content)


class DocumentMaker:
    """Renders, tokenises and fits rows, as the recipe's `template`, `sequence` and `infilling` say. Picklable."""

    def __init__(self, renderer: Renderer, sequence: Limits, infilling: Infilling | None = None, seed: int = 0):
        self.renderer = renderer
        self.sequence = sequence
        self._text = Renderer(_TEXT, renderer.tokenizer)
        limit = sequence.max_length
        self._infiller = Infiller(renderer.tokenizer, infilling, seed, limit) if infilling is not None else None

    def make(self, source: Source, rows: Sequence[Row], problems: Problems) -> list[Document]:
        """The documents of some rows of a source, in order; malformed rows are noted in `problems` and left out."""
        examples: list[tuple[int, Example]] = []
        for row, where, value in rows:
            example = read_example(value, source.layout, source.columns, where, problems)
            if example is not None and source.alone and example.rejected is not None:
                example = replace(example, rejected=None, margin=None)
            if example is not None and source.quality is not None:
                example = source.quality.read(example)
            if example is not None:
                examples.append((row, with_system(example, source.system)))
        jobs = [self._render(example) for _, example in examples]
        spoken = self._encode(self.renderer, jobs, "spoken")
        rejected = self._encode(self.renderer, jobs, "rejected")
        written = self._encode(self._text, jobs, "text")
        documents: list[Document] = []
        for (row, example), job in zip(examples, jobs, strict=True):
            if job.refusal is not None:
                documents.append(_dropped(row, example, REFUSED, job.refusal))
            elif job.text is not None:
                documents += self._fit_text(row, example, next(written))
            elif job.rejected is not None:
                documents.append(self._fit_pair(row, example, next(spoken), next(rejected)))
            elif job.spoken is not None:
                encoded = next(spoken)
                try:
                    documents += self._fit(row, example, encoded)
                except TemplateRefusal as refusal:  # of a part: the whole row was taken
                    documents.append(_dropped(row, example, REFUSED, str(refusal)))
            else:
                documents.append(_dropped(row, example, example.dropped or NOTHING_LABELLED))
        return documents

    def _render(self, example: Example) -> _Job:
        if example.dropped is not None:
            return _Job()
        if example.text is not None:
            return _Job(text=self._text.render([{"role": "assistant", "content": example.text}]))
        try:
            spoken = self.renderer.render(example.messages, tools=example.tools)
            if example.rejected is None:
                return _Job(spoken=spoken)
            return _Job(spoken=spoken, rejected=self.renderer.render(example.rejected, tools=example.tools))
        except TemplateRefusal as refusal:
            return _Job(refusal=str(refusal))

    def _encode(self, renderer: Renderer, jobs: list[_Job], which: str) -> Iterator[Encoded]:
        """All renders of one kind in one call: the tokenizer spreads them over the cores."""
        rendered = [one for one in (getattr(job, which) for job in jobs) if one is not None]
        train_on = "all" if which == "text" else self.sequence.train_on
        return iter(renderer.encode(rendered, train_on) if rendered else ())

    def _fit_text(self, row: int, example: Example, encoded: Encoded) -> list[Document]:
        document = _document(row, example, encoded)
        limit = self.sequence.max_length
        if self._infiller is not None:
            filled = self._infiller.encode(example.text or "", document.key)
            if filled is not None:
                ids, labels, offsets = filled.ids, filled.labels, filled.offsets
                return [replace(document, text=filled.text, ids=ids, labels=labels, offsets=offsets)]
        if len(encoded.ids) <= limit or self.sequence.overlong != "split":
            return [self._cut(document)]
        parts = []
        for part, (start, end) in enumerate(split_tokens(len(encoded.ids), limit)):
            begin = encoded.offsets[start][0]
            offsets = [(a - begin, b - begin) for a, b in encoded.offsets[start:end]]
            text = encoded.text[begin : encoded.offsets[end - 1][1]]
            ids = encoded.ids[start:end]
            one = replace(document, text=text, ids=ids, labels=ids.copy(), offsets=offsets, part=part, split=True)
            parts.append(one if one.labelled else replace(one, dropped=NOTHING_LABELLED))
        return parts

    def _fit(self, row: int, example: Example, encoded: Encoded) -> list[Document]:
        document = _document(row, example, encoded)
        if len(encoded.ids) <= self.sequence.max_length or self.sequence.overlong != "split":
            return [self._cut(document)]
        pieces, too_long = split_conversation(example.messages, lambda turns: self._fits(turns, example))
        renders = [self.renderer.render(piece, tools=example.tools) for piece in pieces]
        encodings = self.renderer.encode(renders, self.sequence.train_on) if renders else []
        parts = [
            self._cut(replace(_document(row, example, one), part=part, piece=piece, split=True))
            for part, (piece, one) in enumerate(zip(pieces, encodings, strict=True))
        ]
        lost = replace(document, dropped=EXCHANGE_OVERLONG)
        return parts + [replace(lost, part=len(parts) + number) for number in range(too_long)]

    def _fits(self, turns: Conversation, example: Example) -> bool:
        rendered = self.renderer.render(turns, tools=example.tools)
        return len(self.renderer.encode([rendered])[0].ids) <= self.sequence.max_length

    def _fit_pair(self, row: int, example: Example, better: Encoded, worse: Encoded) -> Document:
        """Both answers within `max_length`: a pair is kept whole, cut on both sides, or dropped."""
        chosen, rejected = (self._cut(_document(row, example, one)) for one in (better, worse))
        dropped = chosen.dropped or rejected.dropped
        truncated = chosen.truncated or rejected.truncated
        if dropped is None and np.array_equal(chosen.ids, rejected.ids):
            dropped = SAME_WHEN_CUT if truncated else SAME_TOKENS
        closed = chosen.closed and rejected.closed
        return replace(chosen, rejected=rejected, dropped=dropped, truncated=truncated, closed=closed)

    def _cut(self, document: Document) -> Document:
        """A document within `max_length`: as it is, cut at the limit, or dropped."""
        limit = self.sequence.max_length
        if len(document.ids) <= limit:
            return document if document.labelled else replace(document, dropped=NOTHING_LABELLED)
        if self.sequence.overlong != "truncate":
            return replace(document, dropped=OVERLONG)
        offsets = document.offsets[:limit]
        text = document.text[: offsets[-1][1]]
        ids, labels = document.ids[:limit], document.labels[:limit]
        cut = replace(document, text=text, ids=ids, labels=labels, offsets=offsets, truncated=True)
        return cut if cut.labelled else replace(cut, dropped=NO_LABEL)


@dataclass(frozen=True)
class _Job:
    """A row's renders: one of a conversation, two of a pair, one of a text, none of a dropped row."""

    spoken: Rendered | None = None
    rejected: Rendered | None = None
    text: Rendered | None = None
    refusal: str | None = None


def in_chunks(source: Source, problems: Problems, most: int, first: int = 0) -> Iterator[list[Row]]:
    """The rows of a source from number `first` on, at most so many at once, and fewer where they are long.

    Each comes with what messages call it, which only the process that reads the file knows for nothing.
    """
    chunk: list[Row] = []
    size = 0
    for row, value in source.rows(problems):
        if row < first:
            continue
        chunk.append((row, source.where(row), value))
        size += _characters(value)
        if len(chunk) == most or size > CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, parts))


def read_documents(source: Source, maker: DocumentMaker, problems: Problems) -> Iterator[Document]:
    """Yields the documents of every row of `source`, dropped ones included, until a malformed row is met."""
    for chunk in in_chunks(source, problems, CHUNK):
        documents = maker.make(source, chunk, problems)
        if problems:
            return
        yield from documents


def _document(row: int, example: Example, encoded: Encoded) -> Document:
    return Document(row, example, encoded.text, encoded.ids, encoded.labels, encoded.offsets, closed=encoded.closed)


def _dropped(row: int, example: Example, reason: str, refusal: str | None = None) -> Document:
    empty = np.empty(0, dtype=np.int32)
    said = example.text if example.text is not None else "\n\n".join(one["content"] for one in example.messages)
    return Document(row, example, said, empty, empty, [], dropped=reason, refusal=refusal)
