"""A stream whose sources keep their shares of all tokens, and which can be taken up again at any document.

Each source is read block after block: the documents of some rows, in a random order that seed, pass and block decide,
and begins anew where it ends. Where a source stands is three numbers, so a run of weeks goes on in the time that
reading over the rows before takes, and not in that of rendering them all once more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from llama_ft.data.mixture import ByShare
from llama_ft.data.stream import DocumentStream, no_documents

LEAST = 100
"""Rows of a block of the smallest source: enough to be mixed, few enough where each is a book."""
Place = list[int]
"""Where a source stands: its pass, the block in it, and the documents of that block that were given."""


class EndlessSource(Iterator[dict[str, Any]]):
    """The documents of source `number` of a stream, pass after pass, `rows` of it in one block.

    Raises UserError as the stream does, and for a source that gives nothing.
    """

    def __init__(self, stream: DocumentStream, number: int, rows: int, place: Place | None = None):
        self.stream, self.number, self.rows = stream, number, rows
        self.passed, self.block, start = place or [0, 0, 0]
        self.held: list[dict[str, Any]] = []
        self.given, self.seen = 0, False
        self.blocks = self._open(self.block)
        if start:
            self._next_block()
            self.given = start

    @property
    def place(self) -> Place:
        """Where it stands, before the next document."""
        return [self.passed, self.block, self.given]

    def __next__(self) -> dict[str, Any]:
        while self.given >= len(self.held):
            self._next_block()
        self.given += 1
        return self.held[self.given - 1]

    def _open(self, block: int) -> Iterator[tuple[int, Iterator[dict[str, Any]]]]:
        """The blocks of this pass from one on, each with its number."""
        documents = self.stream.documents_of(self.number, block * self.rows)
        return iter(groupby(documents, lambda document: document["row"] // self.rows))

    def _next_block(self) -> None:
        block, documents = next(self.blocks, (None, None))
        if block is None or documents is None:
            if not self.seen:
                raise no_documents(self.stream.sources[self.number])
            self.passed, self.blocks, self.seen = self.passed + 1, self._open(0), False
            return
        self.held, self.block, self.given, self.seen = list(documents), block, 0, True
        random.Random(f"block {self.stream.seed} {self.number} {self.passed} {block}").shuffle(self.held)


class SharedStream(Iterator[dict[str, Any]]):
    """The documents of a :class:`DocumentStream` with shares. `state`: that of an earlier one, to go on from.

    Of mixture.shuffle_buffer each source has its share, as rows of a block, and LEAST of them at least.
    """

    def __init__(self, stream: DocumentStream, state: dict[str, Any] | None = None):
        assert stream.shares is not None
        places = state["sources"] if state is not None else [None] * len(stream.sources)
        buffer = stream.mixture.shuffle_buffer
        self.sources = [
            EndlessSource(stream, number, max(LEAST, round(buffer * share)), place)
            for number, (share, place) in enumerate(zip(stream.shares, places, strict=True))
        ]
        given = state["tokens"] if state is not None else ()
        self.mixed = ByShare(self.sources, stream.shares, lambda document: len(document["input_ids"]), given)

    def __next__(self) -> dict[str, Any]:
        return next(self.mixed)

    @property
    def state(self) -> dict[str, Any]:
        """Where it stands, in JSON's types: tokens given by each source, and the place of each."""
        return {"tokens": list(self.mixed.given), "sources": [source.place for source in self.sources]}
