"""Gaps in texts, for suite `infilling`: spans cut as training cuts them, and single lines that a person would complete.

What is drawn depends on the seed and on the text, not on other texts or on a tokenizer: two models fill the same gaps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_ft.data.infilling import split_text
from llama_ft.evaluate.texts import Text

SPANS, LINES = 96, 320
"""Gaps of each kind, where --limit gives no number: a share of 320 is known to within 5.5 % (Wilson's interval)."""
WINDOW = 1000
"""Characters of a text around and in a span: some 300 tokens of code."""
BEFORE, AFTER = 500, 250
"""Characters that a line is given of what stands before and after it, up to whole lines."""
SHORTEST, LONGEST = 8, 64
"""Characters of such a line, outer white space left out."""
TRIES = 8
"""Cuts that are drawn for a span before its window is given up: short ones can fall on white space alone."""


@dataclass(frozen=True)
class Gap:
    """A text with a gap: what stands before it, what is missing, what stands after it."""

    id: str
    prefix: str
    middle: str
    suffix: str

    @property
    def asked(self) -> str:
        """The text with a mark where the gap is."""
        return f"{self.prefix}█{self.suffix}"


def draw_spans(texts: Sequence[Text], count: int, seed: int) -> list[Gap]:
    """At most `count` gaps, as many of each text as of the others: two cuts in a window of WINDOW characters, drawn
    from all places between them as in training (arXiv 2308.12950, section 2.3). None is white space alone."""
    return _in_turn([_spans(text, seed) for text in texts], count)


def draw_lines(texts: Sequence[Text], count: int, seed: int) -> list[Gap]:
    """At most `count` gaps, each a line of SHORTEST to LONGEST characters without its indentation, all different; as
    many of each text as of the others while they have some."""
    return _in_turn([_lines(text, seed) for text in texts], count)


def _in_turn(sources: list[Iterator[Gap]], count: int) -> list[Gap]:
    """One of each source in turn, those left out that have no more; in the order of the texts in the end."""
    found: list[tuple[int, Gap]] = []
    going = list(enumerate(sources))
    while going and len(found) < count:
        for place, source in list(going):
            gap = next(source, None)
            if gap is None:
                going.remove((place, source))
            elif len(found) < count:
                found.append((place, gap))
    return [gap for _, gap in sorted(found, key=lambda pair: pair[0])]


def _random(text: Text, seed: int, kind: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{kind} {seed} ".encode() + text.text.encode("utf-8", "replace"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _spans(text: Text, seed: int) -> Iterator[Gap]:
    """As many as the text has windows: later ones would be of places that earlier ones have shown."""
    random, whole = _random(text, seed, "span"), text.text
    for number in range(max(1, len(whole) // WINDOW)):
        start = int(random.integers(0, max(1, len(whole) - WINDOW + 1)))
        window = whole[_line_start(whole, start) : start + WINDOW]
        for _ in range(TRIES):
            prefix, middle, suffix = split_text(window, random, "character")
            if middle.strip():
                yield Gap(f"span:{text.id}.{number}", prefix, middle, suffix)
                break


def _lines(text: Text, seed: int) -> Iterator[Gap]:
    whole = text.text
    places, start = [], 0
    for line in whole.splitlines(keepends=True):
        said = line.strip()
        if SHORTEST <= len(said) <= LONGEST:
            places.append((start + line.index(said), said))
        start += len(line)
    seen: set[str] = set()
    for number in _random(text, seed, "line").permutation(len(places)).tolist():
        start, said = places[number]
        if said in seen:
            continue
        seen.add(said)
        end = start + len(said)
        prefix = whole[_line_start(whole, max(0, start - BEFORE)) : start]
        yield Gap(f"line:{text.id}@{start}", prefix, said, whole[end : _line_end(whole, end, end + AFTER)])


def _line_start(text: str, place: int) -> int:
    """The first beginning of a line from `place` on, or `place` itself where none comes soon."""
    if place == 0 or text[place - 1] == "\n":
        return place
    found = text.find("\n", place, place + BEFORE // 2)
    return place if found < 0 else found + 1


def _line_end(text: str, start: int, place: int) -> int:
    """The last end of a line up to `place`, or `place` itself where none lies after `start`."""
    found = text.rfind("\n", start + 1, place)
    return min(place, len(text)) if found < 0 else found + 1
