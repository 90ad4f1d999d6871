"""Several sources become one: how many documents of each a pass takes, and which.

Each source is an endless stream of its own permutations, and every pass takes the next documents of it, so none comes
again before all have been seen. Everything follows from (sizes, counts, seed, epoch): no state is kept, a resumed run
recomputes it, and it is the same on any number of processes. A stream of rows, too large to be indexed, is mixed by
weighted draws and shuffled through a buffer instead, or, where shares of tokens are told, by what is owed to each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from llama_ft.data.order import document_order

T = TypeVar("T")

# numpy pads a short seed with zeros: (seed, epoch) equals (seed, epoch, 0). Ending on another number keeps the
# permutations of sources apart from those of epochs.
SOURCE = 1


def plan_counts(
    sizes: Sequence[int], weights: Sequence[float], epochs: Sequence[float | None], temperature: float = 1.0
) -> list[int]:
    """Documents that one pass over the mixture takes from each source.

    Source i has the share p_i ∝ w_i · n_i^(1/T), and a pass is as long as the sources together, Σ n_i. A source with
    epochs e gives round(e · n_i) whatever its weight, and the others share what they have together. Weight 0 leaves a
    source out. Counts are rounded by largest remainder; a source that is not left out gives at least one document.

    The temperature is that of multilingual pre-training (arXiv 1911.02116 writes 1/T as α): T = 1 goes by size, a large
    T makes sources equal.
    """
    counts = [0] * len(sizes)
    shared = []
    for i, (size, weight, passes) in enumerate(zip(sizes, weights, epochs, strict=True)):
        if not size or not weight:
            continue
        if passes is None:
            shared.append(i)
        else:
            counts[i] = max(1, int(passes * size + 0.5))
    total = sum(sizes[i] for i in shared)
    # In units of the largest size and weight: a size to a high power would overflow.
    largest = max((sizes[i] for i in shared), default=1)
    heaviest = max((weights[i] for i in shared), default=1)
    shares = [weights[i] / heaviest * (sizes[i] / largest) ** (1.0 / temperature) for i in shared]
    for i, count in zip(shared, _apportion(total, shares), strict=True):
        counts[i] = count
    return counts


def _apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` in proportion to `shares`, by largest remainder, each at least one."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


@dataclass(frozen=True)
class Part:
    """A source in the mixture: its documents, how many of them a pass takes, and what share of the pass that is."""

    documents: int
    drawn: int
    share: float

    @property
    def passes(self) -> float:
        """How often each document is seen per pass over the mixture, on average."""
        return self.drawn / self.documents if self.documents else 0.0


@dataclass(frozen=True)
class Mixture:
    """What an epoch consists of: `counts[i]` documents of source i, which has `sizes[i]`.

    Documents are numbered through all sources: source i has the rows offset_i … offset_i + n_i of their concatenation.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for size, count in zip(self.sizes, self.counts, strict=True):
            if count < 0 or (count and not size):
                raise ValueError(f"{count} documents cannot be drawn from a source of {size}")

    def __len__(self) -> int:
        """Documents of an epoch."""
        return sum(self.counts)

    def order(self, epoch: int) -> np.ndarray:
        """The documents of an epoch in the order in which they are trained on, int64 [len(self)].

        Where every source is taken once and whole this is :func:`document_order`. Takes time and memory of the order of
        the documents, whatever the epoch.
        """
        if self.counts == self.sizes:
            return document_order(len(self), self.seed, epoch)
        offsets = np.cumsum([0, *self.sizes[:-1]])
        drawn = [offsets[i] + self._drawn(i, epoch) for i in range(len(self.sizes)) if self.counts[i]]
        if not drawn:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(drawn)[document_order(len(self), self.seed, epoch)]

    def _drawn(self, source: int, epoch: int) -> np.ndarray:
        """Places epoch·count … (epoch + 1)·count of the source's stream of permutations."""
        size, count = self.sizes[source], self.counts[source]
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // size, -(-last // size))
        stream = [np.random.default_rng((self.seed, number, source, SOURCE)).permutation(size) for number in passes]
        start = first - passes.start * size
        return np.concatenate(stream)[start : start + count]

    def parts(self) -> list[Part]:
        """One line per source, for the report."""
        total = len(self) or 1
        return [Part(size, count, count / total) for size, count in zip(self.sizes, self.counts, strict=True)]


def shuffled(stream: Iterator[T], buffer: int, seed: int, epoch: int) -> Iterator[T]:
    """Yields everything in `stream` once, each drawn at random from a buffer of the next `buffer` items.

    An item comes at most `buffer` places early; a buffer as large as the stream shuffles it evenly. The same seed,
    epoch and stream give the same order.
    """
    draw = random.Random(f"shuffled {seed} {epoch}")
    held: list[T] = []
    for item in stream:
        if len(held) < buffer:
            held.append(item)
            continue
        place = draw.randrange(buffer)
        yield held[place]
        held[place] = item
    draw.shuffle(held)
    yield from held


class ByShare(Iterator[T]):
    """Yields from several streams so that each keeps its share of what `size` counts, at every moment.

    Next comes the stream that is furthest behind its share of all that was yielded, the first of equals: after any
    number of items each is within one item of its share, where weighted draws would be off by the root of their number.
    Ends where a stream ends. `given`: what each has yielded so far, in `size`; where it goes on from, all else is told
    by the streams.
    """

    def __init__(
        self,
        streams: Sequence[Iterator[T]],
        shares: Sequence[float],
        size: Callable[[T], int],
        given: Sequence[int] = (),
    ):
        self.streams, self.size = streams, size
        self.parts = [share / sum(shares) for share in shares]
        self.given = list(given) or [0] * len(self.parts)

    def __next__(self) -> T:
        total = sum(self.given)
        owed = [part * total - given for part, given in zip(self.parts, self.given, strict=True)]
        place = max(range(len(owed)), key=lambda i: (owed[i], self.parts[i], -i))
        item = next(self.streams[place])
        self.given[place] += self.size(item)
        return item


def interleaved(streams: Sequence[Iterator[T]], weights: Sequence[float], seed: int, epoch: int) -> Iterator[T]:
    """Yields from several streams, each time from one drawn with probability in proportion to its weight.

    A stream that ends drops out and the others go on in the proportion of their weights until all have ended. A weight
    of 0 leaves a stream out.
    """
    draw = random.Random(f"interleaved {seed} {epoch}")
    open_streams = [(stream, weight) for stream, weight in zip(streams, weights, strict=True) if weight > 0]
    while open_streams:
        place = draw.choices(range(len(open_streams)), [weight for _, weight in open_streams])[0]
        try:
            item = next(open_streams[place][0])
        except StopIteration:
            del open_streams[place]
            continue
        yield item
