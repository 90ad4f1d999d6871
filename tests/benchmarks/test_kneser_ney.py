"""The byte model against one that counts in dictionaries, byte after byte."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from benchmarks.from_nothing import is_title
from benchmarks.kneser_ney import ByteModel, bits_per_byte
from tests.conftest import ROOT


class Slow:
    """Interpolated Kneser-Ney by the book (Chen & Goodman 1998, section 2.7)."""

    def __init__(self, documents: list[bytes], order: int):
        self.order = order
        self.counts: list[Counter] = [Counter() for _ in range(order + 1)]
        grams = {gram for one in documents for gram in self.grams(one)}
        self.counts[order] = Counter(gram for one in documents for gram in self.grams(one))
        for size in range(order - 1, 0, -1):
            longer = grams if size == order - 1 else set(self.counts[size + 1])
            self.counts[size] = Counter(gram[1:] for gram in longer)
        self.after = [defaultdict(Counter) for _ in range(order + 1)]
        for size in range(1, order + 1):
            for gram, count in self.counts[size].items():
                self.after[size][gram[:-1]][gram[-1]] = count

    def grams(self, document: bytes) -> list[bytes]:
        padded = b"\n" * (self.order - 1) + document + b"\n"
        return [padded[i : i + self.order] for i in range(len(document) + 1)]

    def p(self, gram: bytes, size: int) -> float:
        if not size:
            return 1 / 256
        gram = gram[-size:]
        lower = self.p(gram, size - 1)
        follows = self.after[size].get(gram[:-1])
        if follows is None:
            return lower
        of = Counter(self.counts[size].values())
        discount = of[1] / (of[1] + 2 * of[2]) if of[1] else 0.0
        total = sum(follows.values())
        return max(follows[gram[-1]] - discount, 0) / total + discount * len(follows) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_kneser_ney(order):
    train = [b"the llama eats hay", b"the alpaca eats the hay", b"hay", "naïve llamas 🦙".encode()]
    held_out = [b"the llama sleeps", b"hay hay", b"\xff\x00"]
    slow = Slow(train, order)
    bits = sum(-math.log2(slow.p(gram, order)) for one in held_out for gram in slow.grams(one))
    assert ByteModel(train, order).bits(held_out) == pytest.approx(bits, rel=1e-12)


def test_probabilities_come_to_one():
    model = ByteModel([b"abracadabra", b"a cab"])
    for context in (b"\n\n\n\n", b"\n\n\na", b"abra", b"zzzz", b"zzza"):
        base = int.from_bytes(context, "big") << 8
        codes = np.array([base + byte for byte in range(256)], dtype=np.uint64)
        assert model.probabilities(codes).sum() == pytest.approx(1, abs=1e-12), context


def test_more_letters_know_more_of_real_text():
    lines = [one.encode() for one in (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines() if one]
    found = [bits_per_byte(lines[::2], lines[1::2], order) for order in (1, 2, 3)]
    assert found == sorted(found, reverse=True) and 2 < found[-1] < 4 < found[0] < 6


def test_titles_of_articles_are_no_titles_of_sections():
    assert is_title(" = Valkyria Chronicles III = ")
    assert not is_title(" = = Gameplay = = ") and not is_title("a = b") and not is_title("")
