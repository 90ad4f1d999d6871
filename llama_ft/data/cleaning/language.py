"""Which language a conversation is in: its words as a whole, code blocks left out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llama_ft.data.examples import Conversation
from llama_ft.data.languages import Detector

_FENCE = re.compile(r"^`{3}.*?(?:^`{3}|\Z)", re.DOTALL | re.MULTILINE)


class Languages:
    """A filter that keeps conversations in the languages `wanted` (ISO 639 codes: en, zh, …)."""

    def __init__(self, wanted: Iterable[str]):
        """Raises :class:`UserError` for a code that is not known, or where py3langid is not installed."""
        self._detector = Detector(wanted, without=", or clean with --any-language")

    def other(self, conversation: Conversation) -> str | None:
        """The language of a conversation that is in none of the wanted ones; None for one to keep."""
        said = "\n".join(message["content"] for message in conversation if message["role"] in ("user", "assistant"))
        return self._detector.other(_FENCE.sub("\n", said))
