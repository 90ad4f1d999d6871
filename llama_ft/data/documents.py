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
    pending: list[tuple[int, Any]] = []
    for row, value in source.rows(problems):
        pending.append((row, value))
        if len(pending) == CHUNK:
            yield from _chunk(source, pending, renderer, sequence, problems)
            pending = []
    yield from _chunk(source, pending, renderer, sequence, problems)


def _chunk(
    source: Source, rows: list[tuple[int, Any]], renderer: Renderer, sequence: Sequence, problems: Problems
) -> Iterator[Document]:
    outcomes: list[tuple[int, Conversation, str | None, Rendered | None]] = []
    for row, value in rows:
        where = source.where(row)
        conversation, reason = to_conversation(value, source.layout, source.columns, where, problems)
        if conversation is None:
            continue
        conversation = with_system(conversation, source.system)
        rendered = None
        if reason is None:
            try:
                rendered = renderer.render(conversation)
            except TemplateRefusal as refusal:
                problems.add(str(refusal), where=where, key="template")
        outcomes.append((row, conversation, reason, rendered))
    if problems:
        return
    encoded = iter(renderer.encode([r for *_, r in outcomes if r is not None], sequence.train_on))
    for row, conversation, reason, rendered in outcomes:
        if rendered is None:
            text = "\n\n".join(message["content"] for message in conversation)
            empty = np.empty(0, dtype=np.int32)
            yield Document(row, conversation, text, empty, empty, [], dropped=reason)
        else:
            yield _fit(row, conversation, next(encoded), sequence)


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
    cut = replace(
        document, text=text, ids=ids[:limit], labels=labels[:limit], offsets=offsets[:limit], truncated=True
    )
    return cut if cut.labelled else replace(cut, dropped=NO_LABEL)
