"""Test texts inside training rows: prompts of a benchmark, or rows that were held out.

The measure is that of Tülu 3 (arXiv 2411.15124, section 3.2; open-instruct, decontamination/README): a word of the test
text is covered when it lies in a run of 8 words that the training row holds too, and the test text overlaps the row
when more than half of its words are covered by that one row. Words are compared in lower case without punctuation and
white space, so a function that was indented anew or copied into a longer answer is still found.

Half of a short text is a single run, and that is often a phrase that many tasks begin with ("write a function to find
the length of the longest …"). A text of fewer than 32 words therefore overlaps only when more than 0.8 of it is
covered, and one of fewer than 8 words, which has no run, when the row holds all of it in one piece. docs/mixing.md has
the counts on which this rests. A held-out row so short, a heading of one word, say, is in every other row: it overlaps
a row that says nothing else.
"""

from __future__ import annotations

from llama_ft.data.words import words_of

GRAM = 8
SHARE = 0.5
"""Share of a test text's words above which a row overlaps it."""
SHORT, SHORT_SHARE = 32, 0.8
"""The same for a text of fewer words than the first number."""
Gram = tuple[str, ...]


class OverlapIndex:
    """Test texts by name; says which of them a training row holds. Small enough to be sent to workers."""

    def __init__(self, least: float = 0.0, *, whole: bool = False) -> None:
        """`least`: a share of a test text that must be covered in any case, for finding near copies alone.

        With it, texts shorter than a gram are left out: other rows hold them by chance. `whole`: a text shorter
        than a gram is found in a row that has no other words, and in no longer one.
        """
        self._least = least
        self._whole = whole
        self._names: list[str] = []
        self._sizes: list[int] = []
        # Which test texts hold a gram, and at which word it begins there.
        self._grams: dict[Gram, list[tuple[int, int]]] = {}
        # Whole texts that are shorter than a gram, by their first word.
        self._short: dict[str, list[tuple[int, Gram]]] = {}

    def __len__(self) -> int:
        """Test texts in the index."""
        return len(self._names)

    def add(self, text: str, name: str) -> None:
        """Takes a test text; `name` is what a report calls it. A text without a word is passed over."""
        words = words_of(text)
        if not words or (self._least and len(words) < GRAM):
            return
        number = len(self._names)
        self._names.append(name)
        self._sizes.append(len(words))
        if len(words) < GRAM:
            self._short.setdefault(words[0], []).append((number, tuple(words)))
        for at, gram in enumerate(_grams(words)):
            self._grams.setdefault(gram, []).append((number, at))

    def find(self, text: str) -> tuple[str, float] | None:
        """The test text that a training row overlaps, and the share of its words that the row covers; None for none.

        Of several, the one with the largest share is named, of equal ones the one added first.
        """
        over = [(-share, number) for number, share in self._covered(text).items()]
        if not over:
            return None
        share, number = min(over)
        return self._names[number], -share

    def find_all(self, text: str) -> list[tuple[str, float]]:
        """Every test text that a training row overlaps, with the shares, in the order they were added."""
        return [(self._names[number], share) for number, share in sorted(self._covered(text).items())]

    def _covered(self, text: str) -> dict[int, float]:
        """The shares of those test texts that a training row overlaps, by their numbers."""
        words = words_of(text)
        covered: dict[int, set[int]] = {}
        for gram in _grams(words):
            for number, at in self._grams.get(gram, ()):
                covered.setdefault(number, set()).update(range(at, at + GRAM))
        shares = {number: len(places) / self._sizes[number] for number, places in covered.items()}
        shares.update(dict.fromkeys(self._short_in(words), 1.0))
        return {number: share for number, share in shares.items() if share > self._limit(number)}

    def _limit(self, number: int) -> float:
        return max(self._least, SHORT_SHARE if self._sizes[number] < SHORT else SHARE)

    def _short_in(self, words: list[str]) -> set[int]:
        if self._whole:
            alike = self._short.get(words[0], []) if words else []
            return {number for number, wanted in alike if wanted == tuple(words)}
        found = set()
        for first in self._short.keys() & set(words):
            for at in (at for at, word in enumerate(words) if word == first):
                for number, wanted in self._short[first]:
                    if tuple(words[at : at + len(wanted)]) == wanted:
                        found.add(number)
        return found


def _grams(words: list[str]) -> zip[Gram]:
    return zip(*(words[i:] for i in range(GRAM)), strict=False)
