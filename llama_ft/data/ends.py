"""Answers to micro-batches: each prompt laid out once with its answers (ends) behind it, or before every one of them.

One pair: prompt `a b`, chosen `c d`, rejected `e`, where `c`, `d` and `e` carry loss::

    input_ids     a b c d e        int64 [1, T]
    position_ids  0 1 2 3 2        int64 [1, T]    an end goes on where its prompt stops
    cu_seqlens    0 2 4 5          int32 [S + 1]   borders of segments: prompts and ends
    shared        -1 0 0           int32 [S]       the segment that this one sees before itself: its prompt; -1 for none
    rows          1 2 1            int64 [M]       the token that predicts each labelled one: `b` both `c` and `e`
    targets       c d e            int64 [M]       the labelled tokens
    ends          0 2 3            int32 [E + 1]   borders in rows and targets: end i's are ends[i] to ends[i + 1]
    last          3 4              int64 [E]       where each end's last token stands, which a reward model scores
    documents     0 0              int64 [E]       the document, or prompt, of the batch that each end belongs to

In the plain layout an end is one segment with its own copy of the prompt, and `shared` is all -1; so is an end whose
prompt has no other, or an end without a prompt. The first token of a document is never a target: nothing predicts it.
An end without labelled tokens has no rows: it fills a step up, see :func:`end_lengths`. Everything lies on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama_ft.data.batches import Batch, Document, arrays, origins
from llama_ft.data.render import MASKED
from llama_ft.data.shared import first_labelled, in_common

Tokens = np.ndarray | Sequence[int]
Group = tuple[Tokens, Sequence[tuple[Tokens, Tokens]]]
"""A prompt's ids, and ids and labels of each of its ends."""
_OWN = {"margin": np.float32, "desirable": np.bool_, "index": np.int64}
"""Columns of a document that a batch has as [documents], where its rows do; a margin of NaN says that there is none."""


@dataclass(frozen=True)
class PairCollator:
    """Lays out pairs of prepared documents: end 2i is the chosen answer of pair i, end 2i + 1 the rejected one.

    share: whether what both begin with is laid out once. Rows with `margin` or `index` give them as float32 and int64
    [pairs], and those that know where they came from `origins`.
    """

    share: bool

    def __call__(self, pairs: Sequence[Document]) -> Batch:
        groups = [_pair(pair) for pair in pairs]
        return {**lay_groups(groups, share=self.share), **_own(pairs), **origins(pairs)}


class JudgedCollator:
    """Lays out judged answers, an end for each document, and `others`: the same prompts with other answers.

    Takes rows of :class:`llama_ft.data.others.WithOther`. `others` is a batch of its own, for what a policy says of
    answers that are not a prompt's own is asked for before a step and without gradient. Both have `desirable`, bool
    [documents], and `index` where rows do.
    """

    def __call__(self, documents: Sequence[Document]) -> Batch:
        own, others = [], []
        for document in documents:
            ids, labels = arrays(document)
            start = min(first_labelled(labels), len(ids) - 1)
            own.append((ids[:start], [(ids[start:], labels[start:])]))
            others.append((ids[:start], [arrays(document, "other_ids", "other_labels")]))
        said = _own(documents)
        apart = {**lay_groups(others, share=False), **said}
        return {**lay_groups(own, share=False), **said, "others": apart, **origins(documents)}


def lay_out(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], *, share: bool) -> Batch:
    """Lays out prompts with any number of sampled answers each, every token of which is labelled.

    groups: (ids of a prompt, [ids of an answer, …]); ends come in their order. Raises ValueError for no prompts, a
    prompt without answers, or an answer without tokens.
    """
    return lay_groups([(prompt, [(answer, answer) for answer in answers]) for prompt, answers in groups], share=share)


def lay_groups(groups: Sequence[Group], *, share: bool) -> Batch:
    """Lays out prompts with their ends, as the head of this module draws it. Labels of -100 carry no loss.

    Raises ValueError for no prompts, a prompt without ends, an end without tokens, or with another number of labels.
    """
    if not groups:
        raise ValueError("a batch needs at least one document")
    flow = _Flow()
    for document, (prompt, ends) in enumerate(groups):
        if not ends:
            raise ValueError(f"prompt {document} has no ends")
        before = np.asarray(prompt, dtype=np.int64)
        seen = flow.segment(before, 0, -1) if share and len(before) and len(ends) > 1 else None
        for ids, labels in ends:
            tokens, targets = (np.asarray(one, dtype=np.int64) for one in (ids, labels))
            if not len(tokens) or len(tokens) != len(targets):
                raise ValueError(f"an end of prompt {document} has {len(tokens)} ids and {len(targets)} labels")
            if seen is None:
                segment = flow.segment(np.concatenate([before, tokens]), 0, -1)
                start = flow.bounds[segment] + len(before)
                predicts = start - 1
            else:
                start = flow.bounds[flow.segment(tokens, len(before), seen)]
                predicts = flow.bounds[seen + 1] - 1
            flow.end(document, targets, start, predicts if len(before) else -1)
    return flow.batch()


@dataclass
class _Flow:
    """Segments end to end while they are laid out."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    shared: list[int] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    last: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    def segment(self, ids: np.ndarray, position: int, sees: int) -> int:
        """Adds tokens whose first has `position`; returns the segment's number."""
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.bounds.append(self.bounds[-1] + len(ids))
        self.shared.append(sees)
        return len(self.shared) - 1

    def end(self, document: int, labels: np.ndarray, start: int, predicts: int) -> None:
        """Notes an end whose tokens begin at `start`; `predicts`: where its prompt's last token stands, -1 for none."""
        at = np.flatnonzero(labels != MASKED)
        if predicts < 0:
            at = at[at > 0]
        rows = start + at - 1
        rows[at == 0] = predicts
        self.rows.append(rows)
        self.targets.append(labels[at])
        self.ends.append(self.ends[-1] + len(at))
        self.last.append(start + len(labels) - 1)
        self.documents.append(document)

    def batch(self) -> Batch:
        return {
            "input_ids": torch.from_numpy(np.concatenate(self.ids))[None],
            "position_ids": torch.from_numpy(np.concatenate(self.positions))[None],
            "cu_seqlens": torch.tensor(self.bounds, dtype=torch.int32),
            "shared": torch.tensor(self.shared, dtype=torch.int32),
            "rows": torch.from_numpy(np.concatenate(self.rows)),
            "targets": torch.from_numpy(np.concatenate(self.targets)),
            "ends": torch.tensor(self.ends, dtype=torch.int32),
            "last": torch.tensor(self.last),
            "documents": torch.tensor(self.documents),
        }


class End(NamedTuple):
    """An end with its prompt before it, as a document of its own: `ids` and `labels` int64 [tokens], on the host."""

    document: int
    ids: Tensor
    labels: Tensor


def ends_of(batch: Mapping[str, Any]) -> Iterator[End]:
    """The ends of a batch in either layout, in order, each whole and with the document of the batch it belongs to."""
    names = ("rows", "targets", "ends", "last", "documents", "cu_seqlens", "shared")
    rows, targets, ends, last, documents, bounds, shared = (batch[name].cpu() for name in names)
    ids = batch["input_ids"][0].cpu()
    segments = torch.searchsorted(bounds, last.to(bounds.dtype), right=True) - 1
    for number, segment in enumerate(segments.tolist()):
        start, stop = bounds[segment : segment + 2].tolist()
        seen = int(shared[segment])
        prompt = ids[bounds[seen] : bounds[seen + 1]] if seen >= 0 else ids[:0]
        whole = torch.cat([prompt, ids[start:stop]])
        labels = torch.full_like(whole, MASKED)
        own = slice(int(ends[number]), int(ends[number + 1]))
        # What a token of the prompt predicts is the end's first: a prompt's own labels are no end's.
        places = torch.where(rows[own] < start, 0, rows[own] - start + 1) + len(prompt)
        labels[places] = targets[own]
        yield End(int(documents[number]), whole, labels)


def per_end(values: Tensor, ends: Tensor) -> Tensor:
    """Sums of `values` [M] over each end's: [E] in their type, on their device, with gradients.

    ends: borders [E + 1] from 0 to M, as a batch has them. Added up in float64, so that thousands of log-probabilities
    lose nothing but the last rounding, and the order in which a GPU adds does not show.
    """
    numbers = torch.arange(len(ends) - 1, device=ends.device)
    owners = torch.repeat_interleave(numbers, end_lengths(ends), output_size=len(values)).to(values.device)
    sums = values.new_zeros(len(numbers), dtype=torch.float64).index_add(0, owners, values.double())
    return sums.to(values.dtype)


def end_lengths(ends: Tensor) -> Tensor:
    """Labelled tokens of each end, int64 [E]; 0 for what only fills a step up."""
    return ends.diff().long()


def _pair(pair: Document) -> Group:
    ids, labels = arrays(pair)
    other_ids, other_labels = arrays(pair, "rejected_ids", "rejected_labels")
    start = in_common(ids, labels, other_ids, other_labels)
    return ids[:start], [(ids[start:], labels[start:]), (other_ids[start:], other_labels[start:])]


def _own(documents: Sequence[Document]) -> Batch:
    """What documents say of themselves beside their tokens, [documents]."""
    found = {}
    for name, kind in _OWN.items():
        if all(name in document for document in documents):
            values = [document[name] for document in documents]
            found[name] = torch.from_numpy(np.array([np.nan if one is None else one for one in values], dtype=kind))
    return found
