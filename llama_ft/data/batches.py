"""Documents to micro-batches: laid end to end without padding, or padded on the right.

This module and `ends`, which lays out answers, are those of `data` that need torch; only the trainer imports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_ft.data.render import MASKED

Document = Mapping[str, Any]
Batch = dict[str, Any]
ORIGIN = ("source", "row", "part")
"""Columns that say where a document came from: a number among the recipe's sources, a 0-based row, a part of it."""


class PackedCollator:
    """Lays the documents of a micro-batch end to end in one row; documents never see each other.

    Two documents `a b c` and `d e`, labels below (`.` is -100)::

        input_ids     a b c d e
        labels        . b c . e      a document's first token is predicted by nothing
        position_ids  0 1 2 0 1
        cu_seqlens    0 3 5          where documents begin, and the end

    Returns `input_ids`, `labels`, `position_ids` int64 [1, T] and `cu_seqlens` int32 [documents + 1], all on the host:
    attention kernels want the boundaries there. Labels are not shifted; the model compares position t with t + 1.
    Documents that know where they came from also give `origins`, see :func:`origins`.
    """

    def __call__(self, documents: Sequence[Document]) -> Batch:
        ids, labels = _arrays(documents)
        lengths = np.array([len(one) for one in ids])
        packed = np.concatenate(labels)
        boundaries = np.zeros(len(ids) + 1, dtype=np.int32)
        np.cumsum(lengths, out=boundaries[1:])
        packed[boundaries[:-1]] = MASKED
        positions = np.arange(len(packed)) - np.repeat(boundaries[:-1].astype(np.int64), lengths)
        return {
            "input_ids": torch.from_numpy(np.concatenate(ids))[None],
            "labels": torch.from_numpy(packed)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seqlens": torch.from_numpy(boundaries),
            **origins(documents),
        }


class PackCollator(PackedCollator):
    """The same of packs, `{"documents": [...]}`, and of single documents, whose own they are."""

    def __call__(self, documents: Sequence[Document]) -> Batch:
        return super().__call__([one for pack in documents for one in pack.get("documents", [pack])])


@dataclass(frozen=True)
class PaddedCollator:
    """One document a row, padded on the right to the longest with `pad_id`, which carries no loss and no attention.

    Returns `input_ids`, `labels`, `attention_mask` int64 [documents, longest], and `origins` as above.
    """

    pad_id: int

    def __call__(self, documents: Sequence[Document]) -> Batch:
        ids, labels = _arrays(documents)
        longest = max(len(one) for one in ids)
        shape = (len(ids), longest)
        batch = {
            "input_ids": np.full(shape, self.pad_id, dtype=np.int64),
            "labels": np.full(shape, MASKED, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        for row, (tokens, targets) in enumerate(zip(ids, labels, strict=True)):
            batch["input_ids"][row, : len(tokens)] = tokens
            batch["labels"][row, : len(tokens)] = targets
            batch["attention_mask"][row, : len(tokens)] = 1
        batch["labels"][:, 0] = MASKED
        return {name: torch.from_numpy(array) for name, array in batch.items()} | origins(documents)


def origins(documents: Sequence[Document]) -> dict[str, list[tuple[int, ...]]]:
    """`{"origins": [(source, row, part), …]}` of a batch's documents, in their order; empty if they do not know.

    Numbers of the host, which no model reads: a fault in a step is told with the rows that were in it.
    """
    if any(name not in document for document in documents for name in ORIGIN):
        return {}
    return {"origins": [tuple(int(document[name]) for name in ORIGIN) for document in documents]}


def labelled_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """How many tokens of a batch carry loss: what a mean over them divides by."""
    return int((batch["labels"][:, 1:] != MASKED).sum())


def arrays(document: Document, ids: str = "input_ids", labels: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """Fresh int64 arrays of a document's columns `ids` and `labels`. Raises ValueError for an empty or uneven one."""
    tokens, targets = (np.array(document[column], dtype=np.int64) for column in (ids, labels))
    if not len(tokens) or len(tokens) != len(targets):
        raise ValueError(f"a document has {len(tokens)} ids and {len(targets)} labels")
    return tokens, targets


def _arrays(documents: Sequence[Document]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Those of several documents. Raises ValueError for none."""
    if not documents:
        raise ValueError("a batch needs at least one document")
    found = [arrays(document) for document in documents]
    return [tokens for tokens, _ in found], [targets for _, targets in found]
