"""Rows of a source become documents, in file order: kept with ids and labels, or dropped with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_ft.data.layouts import Conversation, to_conversation, with_system
from llama_ft.data.problems import Problems
from llama_ft.data.render import MASKED, Encoded, Rendered, Renderer, Span, TemplateRefusal
from llama_ft.data.sources import Source
from llama_ft.recipe.schema import Sequence

CHUNK = 1000
"""Rows tokenised in one call: enough to keep all cores busy, small enough to keep memory flat."""

OVERLONG = "longer than max_length"
NO_LABEL = "no label left after truncation"
NOTHING_LABELLED = "no labelled token"


@dataclass(frozen=True)
class Document:
    """One row's outcome. `ids`, `labels`: int32 [tokens], empty when the row was dropped before tokenisation.

    `row` is the 0-based position in the source; `dropped` the reason, or None for a kept document; `closed` whether
    its last answer still ends with a labelled end token.
    """

    row: int
    conversation: Conversation
    text: str
    ids: np.ndarray
    labels: np.ndarray
    offsets: list[Span]
    dropped: str | None = None
    truncated: bool = False
    closed: bool = True

    @property
    def labelled(self) -> int:
        """Tokens that carry loss. The first token of a document never does: nothing predicts it."""
        return int(np.count_nonzero(self.labels[1:] != MASKED))


def read_documents(source: Source, renderer: Renderer, sequence: Sequence, problems: Problems) -> Iterator[Document]:
    """Yields a document for every row of `source`, dropped ones included.

    Malformed rows are noted in `problems`; from the first one on, rows are only checked and nothing more is yielded.
    """
    pending: list[_Row] = []
    for row, value in source.rows(problems):
        read = _read(source, row, value, renderer, problems)
        if read is not None and not problems:
            pending.append(read)
        if len(pending) == CHUNK:
            yield from _encode(pending, renderer, sequence)
            pending = []
    if not problems:
        yield from _encode(pending, renderer, sequence)


@dataclass(frozen=True)
class _Row:
    """A row that is well formed: rendered, or to be dropped for a reason."""

    row: int
    conversation: Conversation
    dropped: str | None
    rendered: Rendered | None


def _read(source: Source, row: int, value: Any, renderer: Renderer, problems: Problems) -> _Row | None:
    where = source.where(row)
    conversation, reason = to_conversation(value, source.layout, source.columns, where, problems)
    if conversation is None:
        return None
    conversation = with_system(conversation, source.system)
    if reason is not None:
        return _Row(row, conversation, reason, None)
    try:
        return _Row(row, conversation, None, renderer.render(conversation))
    except TemplateRefusal as refusal:
        problems.add(str(refusal), where=where, key="template")
        return None


def _encode(rows: list[_Row], renderer: Renderer, sequence: Sequence) -> Iterator[Document]:
    rendered = [row.rendered for row in rows if row.rendered is not None]
    encoded = iter(renderer.encode(rendered, sequence.train_on))
    for row in rows:
        if row.rendered is not None:
            yield _fit(row.row, row.conversation, next(encoded), sequence)
            continue
        text = "\n\n".join(message["content"] for message in row.conversation)
        empty = np.empty(0, dtype=np.int32)
        yield Document(row.row, row.conversation, text, empty, empty, [], dropped=row.dropped)


def _fit(row: int, conversation: Conversation, encoded: Encoded, sequence: Sequence) -> Document:
    """A document within `max_length`: as it is, cut at the limit, or dropped."""
    text, ids, labels, offsets = encoded.text, encoded.ids, encoded.labels, encoded.offsets
    document = Document(row, conversation, text, ids, labels, offsets, closed=encoded.closed)
    limit = sequence.max_length
    if len(ids) <= limit:
        return document if document.labelled else replace(document, dropped=NOTHING_LABELLED)
    if sequence.overlong == "drop":
        return replace(document, dropped=OVERLONG)
    text = text[: offsets[limit - 1][1]]
    cut = replace(document, text=text, ids=ids[:limit], labels=labels[:limit], offsets=offsets[:limit], truncated=True)
    return cut if cut.labelled else replace(cut, dropped=NO_LABEL)
