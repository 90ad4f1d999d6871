"""A chunk of rows as one Arrow batch: what preparation's processes hand to the one that writes.

All that costs time happens while a chunk is made, in any process: reading a row's layout, rendering, tokenising,
hashing, looking for overlaps. What needs to know the other rows (copies, a holdout) is left to the writer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from llama_ft.data.copies import signature
from llama_ft.data.documents import NOTHING_LABELLED, REFUSED, Document, DocumentMaker, Row
from llama_ft.data.overlap import OverlapIndex
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source

IDS = pa.list_(pa.int32())
KEPT = [
    pa.field("input_ids", IDS),
    pa.field("labels", IDS),
    pa.field("row", pa.int64()),
    pa.field("part", pa.int32()),
    pa.field("source", pa.int32()),
    pa.field("length", pa.int32()),
    pa.field("labelled", pa.int32()),
]
PAIR = [pa.field("rejected_ids", IDS), pa.field("rejected_labels", IDS), pa.field("margin", pa.float32())]
RATED = [pa.field("desirable", pa.bool_()), pa.field("rating", pa.float32())]
_OWN = {"preference": PAIR, "rated": RATED}
MESSAGES = pa.field("messages", pa.string())
"""A document's conversation, as JSON."""
# What the writer decides by, and does not write.
NEEDED = [
    pa.field("key", pa.binary(16)),
    pa.field("draw", pa.binary(16)),
    pa.field("truncated", pa.bool_()),
    pa.field("overlaps", pa.string()),
    pa.field("signature", pa.binary()),
    MESSAGES,
]


def schema_of(sources: Sequence[Source], *, messages: bool = False) -> pa.Schema:
    """The columns of prepared documents: what all the sources have, and on request what was said in them.

    `length` and `labelled` say what a model computes: of a pair, its prompt once and both answers, and their loss.
    """
    layouts = {source.shape for source in sources}
    own = _OWN.get(layouts.pop(), []) if len(layouts) == 1 else []
    return pa.schema(KEPT + own + ([MESSAGES] if messages else []))


BARE_END = "only the end token labelled: the answer is one token with the end of its prompt"


Faults = dict[str, tuple[int, int, str]]
"""How often a fault was met, the first row, and what is to be said of it."""


@dataclass
class Chunk:
    """Some rows of a source, done. `batch` holds the kept documents, `dropped` (reason, row) of the others."""

    rows: int
    batch: pa.RecordBatch
    dropped: list[tuple[str, int]]
    notes: Counter[str]
    faults: Faults
    problems: Problems


@dataclass
class ChunkMaker:
    """Makes chunks; picklable, so that other processes can.

    `vocabulary`: rows of the model's embedding, if known. `asked`: prompts are asked again, without tools.
    """

    documents: DocumentMaker
    train_on: str
    seed: int
    vocabulary: int | None = None
    near: bool = False
    keep_messages: bool = False
    asked: bool = False
    overlaps: list[OverlapIndex] = field(default_factory=list)

    def make(self, source: Source, number: int, rows: Sequence[Row]) -> Chunk:
        """The chunk of `rows`, which belong to source number `number`."""
        problems = Problems()
        documents = self.documents.make(source, rows, problems)
        notes: Counter[str] = Counter()
        faults: Faults = {}
        places = {row: where for row, where, _ in rows} if self.asked else {}
        for document in documents:
            if self.asked and document.example.tools:
                hint = "leave out the row, or its tools"
                problems.add("a policy cannot be offered tools yet", where=places[document.row], hint=hint)
            notes.update(self._notes(document))
            self._look(document, faults)
        kept = [document for document in documents if document.dropped is None]
        dropped = [(document.dropped, document.row) for document in documents if document.dropped is not None]
        return Chunk(len(rows), _batch(kept, source.shape, number, self), dropped, notes, faults, problems)

    def _notes(self, document: Document) -> list[str]:
        """What the report counts of a document that is kept, or was changed while it was read."""
        notes = list(document.example.notes) if document.part == 0 else []
        if document.dropped is None and document.example.text is None and self.train_on == "responses":
            notes += [BARE_END] if document.labelled <= _trained(document) else []
        return notes

    def _look(self, document: Document, faults: Faults) -> None:
        """Notes the preflight faults of one document."""
        renderer = self.documents.renderer
        if document.dropped == REFUSED:
            _note(faults, "template-refuses", document, document.refusal or "")
        if document.dropped == NOTHING_LABELLED and document.example.text is None and not _muted(document):
            _note(faults, "no-label", document, "")
        if document.dropped is not None:
            return
        unclosed = not document.closed and not document.truncated and document.example.text is None
        if unclosed and self.train_on != "all" and renderer.end_token_id is not None:
            _note(faults, "end-token-unlabelled", document, "")
        bos = renderer.tokenizer.bos_token_id
        sides = [side.ids for side in (document, document.rejected) if side is not None]
        if bos is not None and any(np.any((ids[1:] == bos) & (ids[:-1] == bos)) for ids in sides):
            _note(faults, "two-bos", document, "")
        largest = max(int(ids.max()) for ids in sides)
        if self.vocabulary is not None and largest >= self.vocabulary:
            _note(faults, "vocabulary", document, str(largest))


def _note(faults: Faults, name: str, document: Document, detail: str) -> None:
    count, row, first = faults.get(name, (0, document.row, detail))
    faults[name] = (count + 1, row, first)


def _trained(document: Document) -> int:
    """Answers of a conversation that are to carry loss."""
    answers = (message for message in document.conversation if message["role"] == "assistant")
    return sum(message.get("train") is not False for message in answers)


def _muted(document: Document) -> bool:
    """Whether the row itself keeps loss off every answer, which is its right."""
    answers = [message for message in document.conversation if message["role"] == "assistant"]
    return bool(answers) and all(message.get("train") is False for message in answers)


def _batch(documents: list[Document], layout: str, number: int, maker: ChunkMaker) -> pa.RecordBatch:
    count = len(documents)
    costs = [one.cost for one in documents]
    columns: dict[str, Any] = {
        "input_ids": _lists([one.ids for one in documents]),
        "labels": _lists([one.labels for one in documents]),
        "row": [one.row for one in documents],
        "part": [one.part for one in documents],
        "source": [number] * count,
        "length": [tokens for tokens, _ in costs],
        "labelled": [labelled for _, labelled in costs],
        "key": [one.key for one in documents],
        "draw": [_draw(one, maker.seed) for one in documents],
        "truncated": [one.truncated for one in documents],
        "overlaps": [_overlap(one, maker.overlaps) for one in documents],
        "signature": [_signature(one) if maker.near else None for one in documents],
        "messages": [json.dumps(one.conversation) if maker.keep_messages else None for one in documents],
    }
    if layout == "preference":
        worse = [one.rejected for one in documents if one.rejected is not None]
        columns |= {
            "rejected_ids": _lists([one.ids for one in worse]),
            "rejected_labels": _lists([one.labels for one in worse]),
            "margin": [one.example.margin for one in documents],
        }
    if layout == "rated":
        columns |= {
            "desirable": [one.example.desirable for one in documents],
            "rating": [one.example.rating for one in documents],
        }
    schema = pa.schema([*KEPT, *_OWN.get(layout, []), *NEEDED])
    return pa.record_batch([pa.array(columns[one.name], one.type) for one in schema], schema=schema)


def _draw(document: Document, seed: int) -> bytes:
    """Where a document stands in the draw of a holdout: by what its row says and the seed, not by its place."""
    return hashlib.blake2b(document.key, digest_size=16, key=seed.to_bytes(8, "big")).digest()


def _signature(document: Document) -> bytes | None:
    """Of the whole row, with its first part."""
    numbers = signature(document.example.said) if document.part == 0 else None
    return None if numbers is None else numbers.tobytes()


def _overlap(document: Document, indexes: list[OverlapIndex]) -> str | None:
    found = (index.find(document.own.said) for index in indexes)
    return next((leak[0] for leak in found if leak is not None), None)


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()))
