"""Which language a text is in, by py3langid: whose model comes inside the package: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from llama_ft.errors import UserError, did_you_mean

ENOUGH = 20
"""Letters below which no language can be told."""
LOOKED_AT = 20_000
"""Characters that a text's language is told from, its first: a book need not be read to its end."""

# Written alike: who asks for Chinese means these too.
_SAME = {"wuu": "zh", "yue": "zh"}


class Detector:
    """Tells whether a text is in one of the languages `wanted` (ISO 639 codes: en, zh, …)."""

    def __init__(self, wanted: Iterable[str], *, key: str | None = None, without: str = ""):
        """Raises :class:`UserError` for a code that is not known, or where py3langid is not installed.

        `without`: what else could be done where it is missing, for the hint.
        """
        self._identifier = _identifier(without)
        self.wanted = frozenset(wanted)
        known = set(self._identifier.labels) - set(_SAME)
        for code in sorted(self.wanted - known):
            raise UserError(f"no such language '{code}'", key=key, hint=did_you_mean(code, known, kind="languages"))

    def other(self, words: str) -> str | None:
        """The language of a text that is in none of the wanted ones; None for one to keep, or that is too short."""
        language = self.of(words)
        return None if language in self.wanted else language

    def of(self, words: str) -> str | None:
        """The language of a text; None for one with too few letters to tell. `zxx` is no language: a list, a table."""
        words = words[:LOOKED_AT]
        if sum(map(str.isalpha, words)) < ENOUGH:
            return None
        language = self._identifier.classify(words)[0]
        return _SAME.get(language, language)


def _identifier(without: str) -> Any:
    try:
        from py3langid import langid
    except ImportError as error:
        hint = f"pip install llama-ft[data]{without}"
        raise UserError("telling languages apart needs the package py3langid", hint=hint) from error
    return _loaded(langid.MODEL_FILE)


@lru_cache(maxsize=1)
def _loaded(model: str) -> Any:
    """The model, once a process: it takes most of a second."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(model)
