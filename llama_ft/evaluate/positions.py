"""Suite `positions`: what the tokens of long documents cost, by how far from the beginning they stand.

A model that makes use of what lies far back pays less the further it reads; beyond what its RoPE was made for the cost
rises. All positions are of the same documents, each at least as long as the longest position, read from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.data.documents import DocumentMaker, read_documents
from llama_ft.data.problems import Problems
from llama_ft.data.render import Renderer
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.material import drawn
from llama_ft.evaluate.result import SuiteResult, scored
from llama_ft.evaluate.suites import Context
from llama_ft.evaluate.texts import text_problems, text_sources
from llama_ft.recipe.schema import Sequence as Limits

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

NLL = "nll per token"
DOCUMENTS = 8
"""Documents, where --limit gives no number: 131,072 tokens at a length of 16,384."""
WIDTHS = ((8192, 512), (0, 1024))
"""Tokens of a bucket: 512 up to a length of 8,192, else 1,024."""
ASKED = 400
"""Characters of a document that its row shows."""


@dataclass(frozen=True)
class Long:
    """A document, or a piece of one, of exactly as many tokens as are measured."""

    id: str
    ids: list[int]
    text: str


class Positions:
    """See the module."""

    name = "positions"
    about = "nats per token of long documents, by position"
    kinds = ("documents",)

    def needs(self, context: Context) -> list[Problem]:
        """Texts."""
        return text_problems(context, self.name)

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. UserError where no document is long enough."""
        length = length_of(subject, context)
        documents = drawn(long_documents(subject, context, length), context.limit or DOCUMENTS, context.seed)
        borders = borders_of(length)
        texts = [label for label, _ in text_sources(context)]
        settings = context.settings(
            self.name, subject, length=length, borders=borders, documents=len(documents), texts=texts
        )
        work = _measure(subject, borders)
        rows = context.items(subject, settings, f"documents of {length:,} tokens", documents, work, at_once=1)
        names = [NLL, *(score_name(start, stop) for start, stop in pairs(borders))]
        return SuiteResult(
            self.name,
            subject.name,
            [scored(rows, name, "nats", "lower", context.seed) for name in names],
            rows,
            settings,
            context.seconds(self.name, subject),
            context.leaks({one.id: one.text for one in documents}),
        )


def length_of(subject: Subject, context: Context) -> int:
    """Tokens to read of each document: the longest of `--lengths`, else what the run was trained on, else all that
    the subject reads. UserError for more than it reads."""
    own = context.run.recipe.sequence.max_length if context.run is not None else subject.context
    length = max(context.lengths, default=min(own, subject.context))
    check_length(subject, length)
    return length


def check_length(subject: Subject, length: int) -> None:
    """UserError for more tokens than a subject reads."""
    if length > subject.context:
        theta = (subject.model.config.rope_parameters or {}).get("rope_theta", 10_000.0)
        beyond = f"--rope '{{rope_type: default, rope_theta: {theta:g}}}' reads beyond it all the same"
        hint = f"{beyond}; {{rope_type: yarn, factor: {-(-length // subject.context)}}} is made for it"
        raise UserError(f"{subject.name} reads {subject.context} tokens, not {length}", key="--lengths", hint=hint)


def borders_of(length: int) -> list[int]:
    """0, and where each bucket ends, up to `length`; a document that is shorter than two buckets has four."""
    width = next(width for most, width in WIDTHS if length <= most or not most)
    width = width if length >= 2 * width else max(1, -(-length // 4))
    return [*range(0, length, width), length]


def pairs(borders: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of each bucket."""
    return list(pairwise(borders))


def score_name(start: int, stop: int) -> str:
    """`positions 512 to 1,023`: of the first token of a document, which nothing predicts, the position is 0."""
    return f"positions {start:,} to {stop - 1:,}"


def long_documents(subject: Subject, context: Context, length: int) -> list[Long]:
    """All pieces of exactly `length` tokens, as training with `overlong: split` cuts documents, none of two documents.
    UserError where there is none, with the longest that there is."""
    maker = DocumentMaker(
        Renderer(subject.renderer.template, subject.tokenizer), Limits(max_length=length, overlong="split")
    )
    found, longest = [], 0
    problems = Problems()
    for label, source in text_sources(context):
        for one in read_documents(source, maker, problems):
            longest = max(longest, len(one.ids))
            if len(one.ids) == length:
                found.append(Long(f"{label}:{one.row}.{one.part}", one.ids.tolist(), one.text))
        problems.raise_if_any()
    if not found:
        what = f"no document has {length:,} tokens, the longest has {longest:,}"
        raise UserError(what, key="--data", hint="name longer texts, or a shorter length: --lengths N")
    return found


def _measure(
    subject: Subject, borders: Sequence[int]
) -> Callable[[Sequence[Long], Callable[[int], None]], list[dict[str, Any]]]:
    def work(documents: Sequence[Long], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        rows = []
        for one in documents:
            nats = np.concatenate([[np.nan], subject.losses(one.ids)])  # by position: the first is predicted by nothing
            values: dict[str, Any] = {NLL: [float(np.nanmean(nats)), len(nats) - 1]}
            for start, stop in pairs(borders):
                part = nats[max(1, start) : stop]
                if len(part):
                    values[score_name(start, stop)] = [float(part.mean()), len(part)]
            row = {"id": one.id, "asked": one.text[:ASKED], "answer": "", "tokens": len(one.ids)}
            rows.append({**row, "values": values})
            tick(1)
        return rows

    return work


SUITE = Positions()
