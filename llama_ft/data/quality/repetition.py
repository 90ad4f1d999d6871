"""Gopher's repetition rules: documents that say the same over and over (arXiv 2112.11446, appendix A.1, table A1).

A *repeat* is every occurrence of something but the first. Lines and paragraphs are compared as they stand, words
without case and punctuation. Characters are those of lines, or of words: the white space between them is nobody's.
"""

from __future__ import annotations

import re

import numpy as np

from llama_ft.data.quality.verdict import Verdict
from llama_ft.data.words import words_of

LINES, PARAGRAPHS = 0.30, 0.30
"""Share of lines, and of paragraphs, that are repeats, at the most."""
LINE_CHARACTERS, PARAGRAPH_CHARACTERS = 0.20, 0.20
"""Share of characters in them."""
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""n -> share of characters in the most frequent n-gram of words, at the most."""
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""n -> share of characters in n-grams that are repeats, each character counted once."""

_PARAGRAPHS = re.compile(r"\n\s*\n")


def gopher_repetition(text: str) -> Verdict:
    """Drops a text that repeats itself; the first rule that is broken, in the table's order, is named."""
    return Verdict(text, _repeated_parts(text) or _repeated_words(words_of(text)))


def _repeated_parts(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [part.strip() for part in _PARAGRAPHS.split(text) if part.strip()]
    (of_lines, in_lines), (of_paragraphs, in_paragraphs) = repeats(lines), repeats(paragraphs)
    shares = (
        (of_lines, LINES, "lines"),
        (of_paragraphs, PARAGRAPHS, "paragraphs"),
        (in_lines, LINE_CHARACTERS, "characters are in lines that"),
        (in_paragraphs, PARAGRAPH_CHARACTERS, "characters are in paragraphs that"),
    )
    for share, most, what in shares:
        if share > most:
            return f"more than {most:.0%} of {what} repeat earlier ones"
    return None


def repeats(parts: list[str]) -> tuple[float, float]:
    """(share of parts, share of characters) that are repeats; zeros where there is nothing."""
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again += 1
            characters += len(part)
        seen.add(part)
    whole = sum(map(len, parts))
    return (again / len(parts), characters / whole) if whole else (0.0, 0.0)


def _repeated_words(words: list[str]) -> str | None:
    if not words:
        return None
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    grams = ids
    for n in range(2, max(REPEATED) + 1):
        if len(ids) < n:
            return None
        # An n-gram is a pair, (n-1)-gram and word; both are numbered from 0, so a pair is one number, exactly.
        pairs = grams[: len(ids) - n + 1] * len(ids) + ids[n - 1 :]
        _, first, grams, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if len(counts) == len(pairs):
            return None  # nothing occurs twice, so nothing longer does
        if n in TOP and _top(grams, first, counts, n, lengths) > TOP[n]:
            return f"more than {TOP[n]:.0%} of characters are in one {n}-gram"
        if n in REPEATED and _again(grams, first, n, lengths) > REPEATED[n]:
            return f"more than {REPEATED[n]:.0%} of characters are in {n}-grams that repeat earlier ones"
    return None


def _top(grams: np.ndarray, first: np.ndarray, counts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """Share of characters in the most frequent n-gram, of equally frequent ones in the longest."""
    characters = np.convolve(lengths, np.ones(n, dtype=np.int64), "valid")[first]
    best = np.lexsort((characters, counts))[-1]
    return _covered(np.flatnonzero(grams == best), n, lengths)


def _again(grams: np.ndarray, first: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """Share of characters in n-grams that occurred before."""
    new = np.zeros(len(grams), dtype=bool)
    new[first] = True
    return _covered(np.flatnonzero(~new), n, lengths)


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    inside = np.zeros(len(lengths) + n, dtype=np.int64)
    for offset in range(n):
        inside[starts + offset] = 1
    return float(lengths[inside[: len(lengths)] > 0].sum() / lengths.sum())
