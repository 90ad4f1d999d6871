"""Rows of text judged in any process: what `llama-ft data filter` decides without knowing the other rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_ft.data.cleaning.logs import first_words
from llama_ft.data.copies import signature, text_key
from llama_ft.data.documents import Row
from llama_ft.data.layouts import read_example
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source

READING = "reading"
"""What drops a row before any step sees it."""
MALFORMED = "malformed row"
BEGINNING = 60
"""Characters of a text that the report shows of it."""


@dataclass(frozen=True)
class Judged:
    """One row. `step` and `rule` say what drops it, None both for one that stays so far.

    `line` is the row as JSON with its text as the steps left it under `text`; `size` the characters of that text,
    `read` of the text as it was read; `changed` what was taken out. `key` and `signature` tell copies apart, None where
    nobody asks.
    """

    where: str
    begins: str
    read: int = 0
    size: int = 0
    step: str | None = None
    rule: str | None = None
    changed: tuple[str, ...] = ()
    line: str = ""
    key: bytes = b""
    signature: bytes | None = None


@dataclass(frozen=True)
class JudgedRows:
    """A chunk of them, in order; `malformed` are the problems of those that could not be read."""

    rows: list[Judged]
    malformed: Problems


@dataclass(frozen=True)
class RowJudge:
    """Judges rows by their source's quality steps; picklable. `copies`: what is needed to find copies is computed."""

    copies: str | None = None

    def make(self, source: Source, number: int, rows: Sequence[Row]) -> JudgedRows:
        """The chunk of `rows`."""
        malformed = Problems()
        return JudgedRows([self._judge(source, where, value, malformed) for _, where, value in rows], malformed)

    def _judge(self, source: Source, where: str, value: Any, malformed: Problems) -> Judged:
        said = Problems()
        example = read_example(value, source.layout, source.columns, where, said)
        if example is None or example.text is None:
            malformed.take(said)
            return Judged(first_words(said), "", step=READING, rule=MALFORMED)
        text = example.text
        judged = Judged(where, " ".join(text[: 4 * BEGINNING].split())[:BEGINNING], read=len(text))
        judged = replace(judged, line=as_line(value, source, text))
        if example.dropped is not None:
            return replace(judged, step=READING, rule=example.dropped)
        if source.quality is not None:
            step, verdict = source.quality.judge(text)
            if step is not None:
                return replace(judged, step=step, rule=verdict.rule)
            if verdict.changed:
                text = verdict.text
                judged = replace(judged, line=as_line(value, source, text), changed=verdict.changed)
        judged = replace(judged, size=len(text))
        if self.copies is None:
            return judged
        numbers = signature(text) if self.copies == "near" else None
        return replace(judged, key=text_key(text), signature=None if numbers is None else numbers.tobytes())


def as_line(value: Any, source: Source, text: str) -> str:
    """A row as one line of JSON: `text` first, then the other keys as they were; values JSON cannot hold, as text."""
    column = (source.columns or {}).get("text", "text")
    others = value.items() if isinstance(value, dict) else ()
    own = {name: said for name, said in others if name not in ("text", column)}
    return json.dumps({"text": text, **own}, ensure_ascii=False, default=str) + "\n"
