"""Suite `quick`: whether a run is better than its base, in a few minutes on a CPU.

A part of the held-out documents is scored, the questions of some are answered greedily, and files of multiple choice
that `--data` names are asked by likelihood.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_ft.data.examples import Conversation
from llama_ft.data.render import TemplateRefusal
from llama_ft.data.words import words_of
from llama_ft.errors import Problem
from llama_ft.evaluate.heldout import HITS, NLL, held_out_problems, measure, template_of
from llama_ft.evaluate.material import Choice, Held, choices, data_problems, drawn, held_out, holds_choices
from llama_ft.evaluate.result import SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

DOCUMENTS, PROMPTS, CHOICES = 48, 24, 100
"""Items of each part, where --limit gives no number: two minutes of a CPU core for SmolLM2-135M and a run of it."""
MAX_TOKENS = 128
CHOSEN = ": multiple choice"
"""How the names of scores end whose items are asked as they stand, in no template."""
SHORT = 8
"""Words of an answer up to which it can be matched."""
_OUTER = re.compile(rf"^(?:(?!-?\.?\d)[{re.escape(string.punctuation)} ])+|[{re.escape(string.punctuation)} ]+$")
ENDED, EXACT = "answers that end by themselves", "exact matches of short answers"


@dataclass(frozen=True)
class Question:
    """A conversation up to where it is answered, and the held-out answer."""

    id: str
    turns: Conversation
    reference: str


class Quick:
    """See the module."""

    name = "quick"
    about = "a few minutes: held-out loss, whether answers end, short answers, multiple choice from a file"
    kinds = ("documents", "choices")

    def needs(self, context: Context) -> list[Problem]:
        """Held-out documents, or a file of multiple choice."""
        if any(holds_choices(name) for name in context.data) and (context.run is None or _holds_nothing(context)):
            return data_problems(context)
        return data_problems(context) or held_out_problems(context, self.name)

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite."""
        sizes = {"documents": DOCUMENTS, "prompts": PROMPTS, "choices": CHOICES}
        if context.limit is not None:
            sizes = dict.fromkeys(sizes, context.limit)
        documents: list[Held] = []
        if not held_out_problems(context, self.name):
            documents = held_out(subject, context)
        # Of all that could be asked, so that a larger part of documents does not change which questions are.
        questions = drawn(_questions(documents), sizes["prompts"], context.seed)
        documents = drawn(documents, sizes["documents"], context.seed)
        multiple = choices(context)
        multiple = [one for group in _by_file(multiple) for one in drawn(group, sizes["choices"], context.seed)]
        template = template_of(subject, documents)
        settings = context.settings(self.name, subject, **sizes, max_tokens=MAX_TOKENS, template=template)
        rows = context.items(subject, settings, "held-out documents", documents, measure(subject))
        rows += context.items(subject, settings, "answers", questions, _answer(subject), at_once=PROMPTS)
        rows += context.items(subject, settings, "multiple choice", multiple, _choose(subject))
        seed = context.seed
        scores = [
            scored(rows, NLL, "nats", "lower", seed),
            scored(rows, HITS, "share", "higher", seed),
            scored(rows, ENDED, "share", "higher", seed),
            scored(rows, EXACT, "share", "higher", seed),
            *(scored(rows, name, "share", "higher", seed) for name in _choice_scores(multiple)),
        ]
        prompts = {one.id: one.asked for one in documents}
        prompts |= {one.id: one.turns[-1]["content"] for one in questions if one.id.removeprefix("ask:") not in prompts}
        leaks = context.leaks(prompts | {one.id: one.query for one in multiple})
        found = [score for score in scores if score.rows]
        seconds = context.seconds(self.name, subject)
        return SuiteResult(self.name, subject.name, found, rows, settings, seconds, leaks)


def _holds_nothing(context: Context) -> bool:
    return bool(held_out_problems(context, Quick.name))


def _by_file(found: Sequence[Choice]) -> list[list[Choice]]:
    groups: dict[str, list[Choice]] = {}
    for one in found:
        groups.setdefault(one.id.rpartition(":")[0], []).append(one)
    return list(groups.values())


def _choice_scores(found: Sequence[Choice]) -> list[str]:
    return list(dict.fromkeys(_score_name(one) for one in found))


def _score_name(one: Choice) -> str:
    return one.id.rpartition(":")[0] + CHOSEN


def _questions(documents: Sequence[Held]) -> list[Question]:
    """Documents that end with an answer to something."""
    found = []
    for one in documents:
        if len(one.turns) > 1 and one.turns[-1]["role"] == "assistant" and one.turns[-2]["role"] in ("user", "tool"):
            found.append(Question(f"ask:{one.id}", one.turns[:-1], one.turns[-1]["content"]))
    return found


def _answer(subject: Subject) -> Callable[[Sequence[Question], Callable[[int], None]], list[dict[str, Any]]]:
    def work(questions: Sequence[Question], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        prompts = []
        for one in questions:
            try:
                prompts.append(subject.renderer.prompt_ids(one.turns))
            except TemplateRefusal:  # it takes whole conversations only
                prompts.append([])
        answers = subject.answers(prompts, MAX_TOKENS, tick=tick)
        rows = []
        for one, prompt, [answer] in zip(questions, prompts, answers, strict=True):
            values: dict[str, Any] = {}
            if prompt:
                values[ENDED] = float(answer.ended == "end")
                if 0 < len(words_of(one.reference)) <= SHORT:
                    values[EXACT] = float(same(answer.text, one.reference))
            row = {"id": one.id, "asked": one.turns[-1]["content"], "answer": answer.text, "wanted": one.reference}
            rows.append({**row, "ended": answer.ended, "tokens": len(answer.tokens), "values": values})
        return rows

    return work


def same(said: str, wanted: str) -> bool:
    """Whether two short answers say the same: letter case, outer punctuation and runs of white space apart. The sign of
    a number, and a point that it begins with, belong to it."""
    left, right = (_OUTER.sub("", " ".join(text.split())).casefold() for text in (said, wanted))
    return left == right


def _choose(subject: Subject) -> Callable[[Sequence[Choice], Callable[[int], None]], list[dict[str, Any]]]:
    """Multiple choice as lm-evaluation-harness asks ARC: `QUERY\\nAnswer:` and each answer after a space; the one with
    the highest log-likelihood per character is chosen (its `acc_norm`)."""

    def work(questions: Sequence[Choice], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        asked, owners = [], []
        for number, one in enumerate(questions):
            for prompt, endings in split_choices(subject, f"{one.query}\nAnswer:", [f" {c}" for c in one.choices]):
                asked.append((prompt, endings))
                owners.append(number)
        found: list[list[float]] = [[] for _ in questions]
        for number, said in zip(owners, subject.endings(asked), strict=True):
            found[number] += said
        tick(len(questions))
        rows = []
        for one, said in zip(questions, found, strict=True):
            per_letter = [nats / max(1, len(choice)) for nats, choice in zip(said, one.choices, strict=True)]
            best = max(range(len(said)), key=per_letter.__getitem__)
            values = {_score_name(one): float(best == one.gold)}
            row = {"id": one.id, "asked": one.query, "answer": one.choices[best], "wanted": one.choices[one.gold]}
            rows.append({**row, "log_likelihoods": said, "values": values})
        return rows

    return work


def split_choices(subject: Subject, prompt: str, endings: Sequence[str]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, endings) as ids, each ending tokenised together with the prompt; several where a token joins the two."""
    tokenizer = subject.tokenizer

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text)["input_ids"]]

    end = tokenizer.eos_token_id
    before = encode(prompt)
    if before and before[-1] == end:  # a tokenizer that closes texts
        before = before[:-1]
    whole = []
    for ending in endings:
        ids = encode(prompt + ending)
        whole.append(ids[:-1] if ids and ids[-1] == end else ids)
    size = len(before)
    if all(ids[:size] == before for ids in whole):
        return [(before, [ids[size:] for ids in whole])]
    return [(ids[:size], [ids[size:]]) for ids in whole]


SUITE = Quick()
