"""What a run of `pretrain` reads, pack by pack: whole documents laid into rows of max_length tokens, in a set order.

Packing by first fit puts the longest documents into the first packs; in each window of documents the packs are
therefore shuffled, or every window would begin with its books and end with its scraps. All follows from the recipe
alone, on any number of processes: a resumed run finds its place by counting packs, from the last mark of a stream on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.data.mixture import Mixture
from llama_ft.data.packs import first_fit_decreasing
from llama_ft.data.render import MASKED
from llama_ft.data.shares import SharedStream
from llama_ft.data.stream import DocumentStream

if TYPE_CHECKING:
    import datasets

WINDOW = 512
"""Documents that are packed together: packs of 2,048 tokens are then 98 % full, and order is kept but for a step's."""
SKIPPED = {
    "input_ids": np.zeros(2, dtype=np.int32),
    "labels": np.full(2, MASKED, dtype=np.int32),
    **dict.fromkeys(("source", "row", "part"), 0),
}
"""The document of a pack that was trained on before."""
PACKS = 2
"""The last part of the seed of a window's shuffle, apart from those of mixture.py, which end on 0 and 1."""


def shuffled_packs(lengths: np.ndarray, capacity: int, seed: int, epoch: int, window: int) -> list[np.ndarray]:
    """Packs of one window's documents, each as ascending indices into `lengths` (int64), in a random order."""
    packs = first_fit_decreasing(lengths, capacity)
    order = np.random.default_rng((seed, epoch, window, PACKS)).permutation(len(packs))
    return [packs[i] for i in order]


def packs_of_run(
    mixture: Mixture, lengths: np.ndarray, capacity: int, *, epochs: float, needed: int | None = None
) -> list[np.ndarray]:
    """All packs of a run in their order, as indices into `lengths` (tokens of each document of the mixture's sources).

    epochs: passes over the mixture, of the last one perhaps a part. needed: so many packs instead, whatever passes they
    take. No pack holds documents of two epochs. Raises ValueError for a document longer than `capacity`.
    """
    found: list[np.ndarray] = []
    for epoch in count() if len(mixture) else ():
        order = mixture.order(epoch)
        if needed is None:
            order = order[: round(min(1.0, epochs - epoch) * len(order))] if epochs > epoch else order[:0]
        if not len(order) or (needed is not None and len(found) >= needed):
            break
        for number, start in enumerate(range(0, len(order), WINDOW)):
            part = order[start : start + WINDOW]
            found += [part[pack] for pack in shuffled_packs(lengths[part], capacity, mixture.seed, epoch, number)]
    return found[:needed]


class Packs:
    """Reads packs by their number, as the transform of a `datasets.Dataset` that has nothing but these numbers.

    documents: rows of `Prepared.train`, in numpy format. The number of packs itself stands for a pack of the one
    document `silent`, which has no label: it fills the last pass of several processes.
    """

    def __init__(self, documents: Any, packs: Sequence[np.ndarray], silent: int):
        self.documents, self.packs = documents, [*packs, np.array([silent])]

    def dataset(self) -> datasets.Dataset:
        """`[{"documents": [...]}, …]`, one item a pack, the silent one last."""
        import datasets

        numbers = datasets.Dataset.from_dict({"pack": np.arange(len(self.packs))})
        return numbers.with_transform(self)

    def __call__(self, numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        packs = [self.packs[number] for number in numbers["pack"]]
        return {"documents": [[self.documents[int(i)] for i in pack] for pack in packs]}


@dataclass
class PackStream:
    """The packs of a streamed run: reads a window of documents, yields its packs, goes on without end. Picklable.

    `start`: the mark that an earlier stream left, from which this one goes on. Packs before it come as empty ones,
    which nobody trains on: whoever resumes counts them and throws them away.
    """

    stream: DocumentStream
    capacity: int
    seed: int
    start: dict[str, Any] | None = None
    marks: list[dict[str, Any]] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """`{"documents": [...]}`, pack after pack."""
        start = self.start or {"packs": 0, "window": 0, "stream": None}
        yield from repeat({"documents": [SKIPPED]}, start["packs"])
        shared = SharedStream(self.stream, start["stream"]) if self.stream.shares is not None else None
        documents = iter(self.stream) if shared is None else shared
        packs = start["packs"]
        for number in count(start["window"]):
            if shared is not None:
                self.marks.append({"packs": packs, "window": number, "stream": shared.state})
            held = list(islice(documents, WINDOW))
            lengths = np.array([len(document["input_ids"]) for document in held])
            for pack in shuffled_packs(lengths, self.capacity, self.seed, 0, number):
                packs += 1
                yield {"documents": [held[i] for i in pack]}

    def mark(self, packs: int) -> dict[str, Any] | None:
        """The last mark at or before so many packs, as JSON has it; None for a stream without shares.

        Earlier ones are forgotten: what is asked for next lies behind it.
        """
        while len(self.marks) > 1 and self.marks[1]["packs"] <= packs:
            self.marks.pop(0)
        return self.marks[0] if self.marks else None
