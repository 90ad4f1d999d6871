"""The quality steps of a source, in the order in which its recipe names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from llama_ft.data.examples import Example
from llama_ft.data.languages import Detector
from llama_ft.data.quality.c4 import c4
from llama_ft.data.quality.code import code
from llama_ft.data.quality.gopher import gopher_quality
from llama_ft.data.quality.repetition import gopher_repetition
from llama_ft.data.quality.verdict import Judge, Verdict
from llama_ft.recipe.schema import QualityStep

Languages = tuple[str, ...]

JUDGES: dict[QualityStep, Callable[[Languages], Judge]] = {
    "language": lambda languages: partial(_language, languages=languages),
    "gopher-repetition": lambda _: gopher_repetition,
    "gopher-quality": lambda languages: partial(gopher_quality, languages=languages),
    "c4": lambda _: c4,
    "code": lambda _: code,
}
"""What each step does, for the languages that a source is to be in."""
PROSE: tuple[QualityStep, ...] = ("language", "gopher-repetition", "gopher-quality")
"""Steps for prose, where nobody says. `c4` is for web pages alone, and takes lines out of them."""
CODE: tuple[QualityStep, ...] = ("code",)
"""Steps for files of code, which no rule for prose judges."""


@dataclass(frozen=True)
class Quality:
    """Steps that a text goes through, and the languages it may be in. Picklable; its verdicts depend on the text."""

    steps: tuple[QualityStep, ...]
    languages: Languages = ("en",)

    def judge(self, text: str) -> tuple[QualityStep | None, Verdict]:
        """The first step that drops a text, with its verdict; (None, what is left and what was taken out) otherwise.

        What one step took out of a text the next ones do not see.
        """
        changed: list[str] = []
        for step in self.steps:
            verdict = JUDGES[step](self.languages)(text)
            if verdict.rule is not None:
                return step, verdict
            text = verdict.text
            changed += [f"{step}: {rule}" for rule in verdict.changed]
        return None, Verdict(text, changed=tuple(changed))

    def read(self, example: Example) -> Example:
        """A row of text as the steps leave it; others, and rows that are dropped already, as they are."""
        if example.text is None or example.dropped is not None:
            return example
        step, verdict = self.judge(example.text)
        if step is not None:
            return replace(example, dropped=f"{step}: {verdict.rule}")
        return replace(example, text=verdict.text, notes=(*example.notes, *verdict.changed))

    def check(self, key: str | None = None) -> None:
        """Raises :class:`UserError` for an unknown language, or where a step's library is missing."""
        if "language" in self.steps:
            Detector(self.languages, key=key, without=", or leave out the step language")


def _language(text: str, languages: Languages) -> Verdict:
    other = _detector(languages).other(text)
    return Verdict(text) if other is None else Verdict(text, f"in another language ({other})")


@lru_cache(maxsize=8)
def _detector(languages: Languages) -> Detector:
    return Detector(languages, without=", or leave out the step language")
