"""Suite `infilling`: what the middle of a text costs given what stands around it, and whether a missing line is found.

Spans are scored in both forms that training writes (llama_ft/data/infilling.py), and from left to right, which is what
a model can do that knows no gaps. Lines are written greedily up to the end token and compared letter for letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.data.infilling import Infilled, InfillingEncoder, InfillingTokens
from llama_ft.data.render import MASKED
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.counts import INTERVALS, counted, said
from llama_ft.evaluate.gaps import LINES, SPANS, Gap, draw_lines, draw_spans
from llama_ft.evaluate.result import Score, SuiteResult, scored
from llama_ft.evaluate.suites import Context
from llama_ft.evaluate.texts import Text, read_texts, text_problems, text_sources

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

FORMS = {"psm": False, "spm": True}
"""Prefix first, suffix first; with whether the latter."""
BLIND = "left to right"
NLL, EXACT, ENDED = "nll per middle token", "exact match", "ends by itself"
MAX_TOKENS = 64
"""Of a line that is written, which has 64 characters at most."""
AT_ONCE = 32


class Infills:
    """See the module."""

    name = "infilling"
    about = "middles of texts in PSM and SPM: nats per token, and single lines written exactly"
    kinds = ("documents",)

    def needs(self, context: Context) -> list[Problem]:
        """Texts."""
        return text_problems(context, self.name)

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. UserError for a tokenizer without tokens for infilling."""
        asker = Asker.of(subject, context)
        texts = read_texts(context)
        spans = draw_spans(texts, context.limit or SPANS, context.seed)
        lines = draw_lines(texts, context.limit or LINES, context.seed)
        kept = [[gap for gap in gaps if asker.fits(gap)] for gaps in (spans, lines)]
        if not any(kept):
            what = f"no gap fits into the {subject.context} tokens that {subject.name} reads, or the texts hold none"
            raise UserError(what, key="--data", hint="name longer texts, of lines of 8 to 64 characters")
        settings = context.settings(
            self.name,
            subject,
            spans=len(spans),
            lines=len(lines),
            max_tokens=MAX_TOKENS,
            tokens=asker.names,
            texts=[label for label, _ in text_sources(context)],
        )
        rows = context.items(subject, settings, "spans", kept[0], asker.score, at_once=AT_ONCE)
        rows += context.items(subject, settings, "lines", kept[1], asker.write, at_once=AT_ONCE)
        scores = [scored(rows, f"{form}: {NLL}", "nats", "lower", context.seed) for form in (*FORMS, BLIND)]
        shares = [counted(rows, f"{form}: {measure}") for form in FORMS for measure in (EXACT, ENDED)]
        found = [score for score in (*scores, *shares) if score is not None and score.rows]
        return SuiteResult(
            self.name,
            subject.name,
            found,
            rows,
            settings,
            context.seconds(self.name, subject),
            context.leaks(_used(texts, spans + lines)),
            [
                *_said([score for score in found if score.name.endswith(EXACT)]),
                *_left_out(len(spans) + len(lines) - sum(map(len, kept))),
            ],
        )


def _used(texts: Sequence[Text], gaps: Sequence[Gap]) -> dict[str, str]:
    """The texts that gaps were drawn from, by id."""
    used = {gap.id.partition(":")[2].rpartition("@")[0] or gap.id.partition(":")[2].rpartition(".")[0] for gap in gaps}
    return {text.id: text.text for text in texts if text.id in used}


def _said(shares: Sequence[Score]) -> list[str]:
    counts = ", ".join(f"{score.name} {said(score)}" for score in shares)
    return [f"{counts}; {INTERVALS}"] if shares else []


def _left_out(count: int) -> list[str]:
    return [f"{count} gaps were longer than the model reads and left out"] if count else []


@dataclass(frozen=True)
class Asker:
    """Writes gaps for one subject. ids: of the four tokens, by their names; encoder: with that subject's tokenizer."""

    subject: Subject
    ids: dict[str, int]
    encoder: InfillingEncoder

    @classmethod
    def of(cls, subject: Subject, context: Context) -> Asker:
        """With the tokens that the user names, else the run's recipe, else those of a known family. UserError as
        :meth:`InfillingTokens.find`."""
        recipe = context.run.recipe.infilling if context.run is not None else None
        names = context.infilling_tokens or (recipe.tokens if recipe is not None else None)
        try:
            tokens = InfillingTokens.find(subject.tokenizer, names)
        except UserError as error:
            raise UserError(replace(one, key="--infilling-tokens") for one in error.problems) from None
        four = [tokens.prefix, tokens.suffix, tokens.middle, tokens.end]
        vocabulary = subject.tokenizer.get_vocab()
        return cls(subject, {name: vocabulary[name] for name in four}, InfillingEncoder(subject.tokenizer, tokens))

    @property
    def names(self) -> list[str]:
        """Before prefix, suffix and middle; at the end."""
        return list(self.ids)

    def fits(self, gap: Gap) -> bool:
        """Whether the subject reads it in either form, and what it writes."""
        room = self.subject.context - (MAX_TOKENS if gap.id.startswith("line:") else 0)
        return all(len(self._whole(gap, form).ids) <= room for form in FORMS)

    def _whole(self, gap: Gap, form: str) -> Infilled:
        return self.encoder.encode(gap.prefix, gap.middle, gap.suffix, spm=FORMS[form])

    def score(self, gaps: Sequence[Gap], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        """What the middles cost, as Context.items asks."""
        ways = [*FORMS, BLIND]
        documents = [self.document(gap, way) for gap in gaps for way in ways]
        costs = iter(self.subject.costs(documents))
        rows = []
        for gap in gaps:
            own = [(way, next(costs)) for way in ways]
            values = {f"{way}: {NLL}": [cost.nats / cost.tokens, cost.tokens] for way, cost in own if cost.tokens}
            rows.append({"id": gap.id, "asked": gap.asked, "answer": "", "wanted": gap.middle, "values": values})
            tick(1)
        return rows

    def document(self, gap: Gap, way: str) -> tuple[list[int], list[int]]:
        """A gap in a form, or `left to right`: prefix and middle alone. ids [tokens], and labels of the same length of
        which the middle's tokens are not −100. In SPM prefix and middle are one text: a token that holds the end of
        the one and the beginning of the other belongs to the middle."""
        whole = self._whole(gap, "psm" if way == BLIND else way)
        ids = whole.ids.tolist()
        if way == BLIND:
            first, suffix, middle = (ids.index(self.ids[name]) for name in self.names[:3])
            before = ids[:first] + ids[first + 1 : suffix]
            ids, start = before + ids[middle + 1 : -1], len(before)
        elif FORMS[way]:
            border = sum(map(len, self.names[:3])) + len(gap.suffix) + len(gap.prefix)
            start = int(np.argmax([end > border for _, end in whole.offsets]))
        else:
            start = ids.index(self.ids[self.names[2]]) + 1
        stop = len(ids) - (way != BLIND)
        return ids, [MASKED] * start + ids[start:stop] + [MASKED] * (len(ids) - stop)

    def write(self, gaps: Sequence[Gap], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        """The missing lines, greedily, as Context.items asks."""
        end = self.ids[self.names[3]]
        said: list[dict[str, tuple[str, bool]]] = [{} for _ in gaps]
        for form, spm in FORMS.items():
            prompts = [self.encoder.prompt(gap.prefix, gap.suffix, spm=spm) for gap in gaps]
            answers = self.subject.answers(prompts, MAX_TOKENS, ends=self.subject.stop | {end})
            for place, [answer] in enumerate(answers):
                ended = answer.tokens[-1:] == [end]
                said[place][form] = (answer.text.removesuffix(self.names[3]) if ended else answer.text, ended)
        rows = []
        for gap, own in zip(gaps, said, strict=True):
            values = {}
            for form, (text, ended) in own.items():
                values[f"{form}: {EXACT}"] = float(ended and text.strip() == gap.middle)
                values[f"{form}: {ENDED}"] = float(ended)
            written = "\n".join(f"{form}: {text}" for form, (text, _) in own.items())
            rows.append({"id": gap.id, "asked": gap.asked, "answer": written, "wanted": gap.middle, "values": values})
            tick(1)
        return rows


SUITE = Infills()
