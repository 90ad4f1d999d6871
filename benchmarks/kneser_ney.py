"""A Kneser-Ney model of bytes: what counting five letters at a time makes of a text, a mark for a network to pass.

Interpolated Kneser-Ney (Kneser & Ney 1995, in the form of Chen & Goodman 1998, section 2.7): the highest order is of
counts, each lower one of how many different bytes an n-gram follows, all discounted by D = n₁ / (n₁ + 2·n₂) of their
order, n₁ and n₂ being the n-grams seen once and twice; below the first order every byte is as likely as another.

    python -m benchmarks.kneser_ney TRAIN.txt HELD_OUT.txt      # a document a line
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ORDER = 5
END = 10
"""The byte that ends a document and, repeated, stands before it: the newline."""


class ByteModel:
    """P(byte | the ORDER − 1 bytes before it), learnt from documents (without their newline)."""

    def __init__(self, documents: Sequence[bytes], order: int = ORDER):
        self.order = order
        grams, counts = np.unique(codes_of(documents, order), return_counts=True)
        self.tables = []
        for size in range(order, 0, -1):
            self.tables.append(_Table(grams, counts.astype(np.float64)))
            # What comes below counts in how many ways an n-gram is begun.
            grams, counts = np.unique(grams & np.uint64((1 << 8 * (size - 1)) - 1), return_counts=True)

    def bits(self, documents: Sequence[bytes]) -> float:
        """−log₂ P of all bytes of the documents, each one's ending newline with it."""
        return float(-np.log2(self.probabilities(codes_of(documents, self.order))).sum())

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """P of the last byte of each code, given the bytes before it."""
        p = np.full(len(codes), 1 / 256)
        for size in range(1, self.order + 1):
            p = self.tables[self.order - size].interpolated(codes & np.uint64((1 << 8 * size) - 1), p)
        return p


class _Table:
    """One order: n-grams (uint64, ascending), their counts, and what follows each context."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        self.grams, self.counts = grams, counts
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once else 0.0
        self.contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.followers = np.diff(np.append(first, len(grams)))

    def interpolated(self, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P of each code's last byte after the ones before it, given that of the order below."""
        count = _found(self.grams, self.counts, codes)
        context = codes >> np.uint64(8)
        total, followers = (_found(self.contexts, one, context) for one in (self.totals, self.followers))
        known = total > 0
        safe = np.where(known, total, 1.0)
        here = np.maximum(count - self.discount, 0.0) / safe + self.discount * followers / safe * lower
        return np.where(known, here, lower)


def _found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys, 0 for one that is not there. keys: ascending."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0).astype(np.float64)


def codes_of(documents: Sequence[bytes], order: int) -> np.ndarray:
    """Every byte with the `order` − 1 before it, packed into a number, uint64: of each document, its end included."""
    lead = bytes([END]) * (order - 1)
    joined = np.frombuffer(b"".join(lead + one + bytes([END]) for one in documents), dtype=np.uint8)
    packed = np.zeros(len(joined) - order + 1, dtype=np.uint64)
    for place in range(order):
        packed = (packed << np.uint64(8)) | joined[place : place + len(packed)]
    lengths = np.array([len(one) + 1 for one in documents])
    starts = np.concatenate([[0], np.cumsum(lengths + order - 1)[:-1]])
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return packed[np.repeat(starts, lengths) + within]


def bits_per_byte(train: Sequence[bytes], held_out: Sequence[bytes], order: int = ORDER) -> float:
    """Of the held-out documents, newlines counted."""
    return ByteModel(train, order).bits(held_out) / sum(len(one) + 1 for one in held_out)


def main() -> None:
    """See the module's docstring."""
    train, held_out = (
        [line for line in Path(name).read_bytes().split(b"\n") if line.strip()] for name in sys.argv[1:3]
    )
    for order in range(1, ORDER + 1):
        found = bits_per_byte(train, held_out, order)
        print(f"order {order}: {found:.4f} bits per byte, perplexity {math.pow(2, found):.2f}")


if __name__ == "__main__":
    main()
