"""Stop strings: an answer ends before the one that is complete first, in whatever pieces it comes.

Engines differ here (transformers leaves the string in the answer), so the gateway cuts by itself.
"""

from __future__ import annotations


class Cutter:
    """Lets text through up to a stop string. What may still become one is held back."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.cut = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The part of all text so far that can be shown now and was not yet; nothing any more after a stop."""
        if self.cut:
            return ""
        text = self._held + text
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.cut, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back when the answer has ended: it became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
