"""Gopher's quality rules: MassiveText's filter of web pages (arXiv 2112.11446, appendix A.1, "Quality Filtering").

The paper gives the thresholds and leaves three words open. Here a *word* is what stands between white space, a *line*
is one that is not blank, and a *bullet* one of :data:`BULLETS`.
"""

from __future__ import annotations

from collections.abc import Iterable

from llama_ft.data.quality.verdict import Verdict
from llama_ft.data.words import words_of

FEWEST_WORDS, MOST_WORDS = 50, 100_000
"""Words of a document."""
SHORTEST, LONGEST = 3, 10
"""Characters of a word, on average."""
SYMBOLS = 0.1
"""Number signs per word, and ellipses per word, at the most."""
BULLET_LINES = 0.9
"""Share of lines that begin with a bullet, at the most."""
CUT_LINES = 0.3
"""Share of lines that end with an ellipsis, at the most."""
WITH_LETTER = 0.8
"""Share of words with a letter in them, at the least."""
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
FEWEST_STOP_WORDS = 2
"""Different ones of them in a document."""
BULLETS = ("•", "-", "*")
_ELLIPSES = ("...", "…")


def gopher_quality(text: str, languages: Iterable[str] = ("en",)) -> Verdict:
    """Drops what is hardly prose; the first rule that is broken, in the paper's order, is named.

    languages: what the text may be in; its stop words are English and are asked for only where that is one of them.
    """
    words = text.split()
    rule = _of_count(words) or _of_symbols(text, len(words)) or _of_letters(words)
    if rule is None and "en" in languages and len(STOP_WORDS.intersection(words_of(text))) < FEWEST_STOP_WORDS:
        rule = f"fewer than {FEWEST_STOP_WORDS} of the English stop words"
    return Verdict(text, rule)


def _of_count(words: list[str]) -> str | None:
    if len(words) < FEWEST_WORDS:
        return f"fewer than {FEWEST_WORDS} words"
    if len(words) > MOST_WORDS:
        return f"more than {MOST_WORDS:,} words"
    if not SHORTEST <= sum(map(len, words)) / len(words) <= LONGEST:
        return f"words of fewer than {SHORTEST} or more than {LONGEST} characters on average"
    return None


def _of_symbols(text: str, words: int) -> str | None:
    if text.count("#") > SYMBOLS * words or sum(map(text.count, _ELLIPSES)) > SYMBOLS * words:
        return "more than one # or ellipsis in ten words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > BULLET_LINES * len(lines):
        return f"more than {BULLET_LINES:.0%} of lines begin with a bullet"
    if sum(line.endswith(_ELLIPSES) for line in lines) > CUT_LINES * len(lines):
        return f"more than {CUT_LINES:.0%} of lines end with an ellipsis"
    return None


def _of_letters(words: list[str]) -> str | None:
    if sum(any(map(str.isalpha, word)) for word in words) < WITH_LETTER * len(words):
        return f"fewer than {WITH_LETTER:.0%} of words have a letter"
    return None
