"""KTO's other answers: what a policy says of answers to prompts that are not theirs tells how far it has moved.

KTO measures every answer from a point of reference, KL(π ‖ π_ref), which it estimates from mismatched pairs: prompt i
with the answer to prompt i + 1 (arXiv 2402.01306, z₀). The paper and TRL take it from the same micro-batch, so that the
loss depends on how a step is cut, and on one document a pass there is none. Here it is the next document's in the set:
the same whatever the batch, the order and the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.data.shared import first_labelled

if TYPE_CHECKING:
    import datasets


class WithOther:
    """Judged documents, each with the answer of the next one: a data set as torch's loaders read it.

    documents: prepared documents in numpy format. max_length: the most tokens that a prompt and the other's answer may
    have together; the answer is cut there.

    Row i is document i's row with `other_ids` and `other_labels` (int [tokens]): those of document i + 1, of the last
    one the first, from its first labelled token on. Documents without loss behind the others, which only fill steps up
    (llama_ft.train.steps.with_silence), have their own last token there, and are no other's.
    """

    def __init__(self, documents: datasets.Dataset, max_length: int):
        self.documents, self.max_length = documents, max_length

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as torch's loaders ask for them."""
        own = [int(number) for number in numbers]
        rows = self.documents.__getitems__(own)
        others = self.documents.__getitems__([self.other_of(number) for number in own])
        return [row | self._answer(row, other) for row, other in zip(rows, others, strict=True)]

    def other_of(self, number: int) -> int:
        """The document whose answer comes with document `number`."""
        return (number + 1) % self.real if number < self.real else number

    @cached_property
    def real(self) -> int:
        """Documents up to the last one that teaches something; those behind it fill steps up."""
        teaches = np.flatnonzero(self.documents.with_format("numpy")["labelled"][:])
        return int(teaches[-1]) + 1 if len(teaches) else 0

    def _answer(self, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        room = max(1, self.max_length - first_labelled(row["labels"]))
        start = min(first_labelled(other["labels"]), len(other["labels"]) - 1)
        columns = {"other_ids": "input_ids", "other_labels": "labels"}
        return {name: other[column][start : start + room] for name, column in columns.items()}
