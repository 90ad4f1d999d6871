"""Suite `chat`: answers to questions of chat benchmarks, turn by turn, kept for people and for judges.

By themselves they tell whether answers come to an end and how much they repeat; how good they are is what suite `judge`
asks a judge about.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_ft.data.examples import Conversation
from llama_ft.data.render import TemplateRefusal
from llama_ft.data.words import words_of
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.answers import Answer, seed_of
from llama_ft.evaluate.chat.questions import Question, questions
from llama_ft.evaluate.material import kind_of
from llama_ft.evaluate.result import SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

ENDED, REPEATED = "answers that end by themselves", "words said again"
MAX_TOKENS = 1024
"""Of an answer: what FastChat's gen_model_answer.py draws at the most."""
RUN = 4
"""Words that, one behind the other and in the same order as earlier in an answer, are said again."""
AT_ONCE = 80
"""Questions that are answered and kept together: MT-bench is one such block."""


class Chat:
    """See the module."""

    name = "chat"
    about = "answers to MT-bench, Vicuna's 80, AlpacaEval or self-instruct from --data, kept to be judged"
    kinds = ("questions",)

    def needs(self, context: Context) -> list[Problem]:
        """A file of questions that can be read."""
        if not any(kind_of(name) == "questions" for name in context.data):
            hint = (
                "--data question.jsonl (FastChat: MT-bench, Vicuna), alpaca_eval.json, user_oriented_instructions.jsonl"
            )
            return [Problem("suite chat needs a file of questions", key="--data", hint=hint)]
        try:
            questions(context)
        except UserError as error:
            return list(error.problems)
        return []

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Answers all questions; see suites.Suite. UserError for a subject without a template."""
        try:
            subject.renderer.prompt_ids([{"role": "user", "content": "?"}])
        except TemplateRefusal as refusal:
            hint = "a model by itself: --template NAME" if context.run is None else "measure it with the suite heldout"
            raise UserError(f"{subject.name} cannot be asked questions: {refusal}", hint=hint) from refusal
        asked = questions(context)
        most = context.max_tokens or MAX_TOKENS
        settings = context.settings(
            self.name,
            subject,
            max_tokens=most,
            temperature="by category" if context.temperature is None else context.temperature,
            template=subject.renderer.template.sha256[:16],
            system=subject.system,
        )
        work = _answer(subject, context, most)
        rows = context.items(subject, settings, "questions answered", asked, work, at_once=AT_ONCE)
        sources = list(dict.fromkeys(row["source"] for row in rows))
        if len(sources) > 1:
            rows = [row | {"values": row["values"] | _of_source(row)} for row in rows]
        prefixes = ["", *(f"{source}: " for source in sources if len(sources) > 1)]
        scores = []
        for prefix in prefixes:
            scores.append(scored(rows, prefix + ENDED, "share", "higher", context.seed))
            scores.append(scored(rows, prefix + REPEATED, "share", "lower", context.seed))
        leaks = context.leaks({one.id: one.asked for one in asked})
        silent = sum("unasked" in row for row in rows)
        remarks = [f"of {silent} questions only the first turn was asked: its template takes one"] if silent else []
        seconds = context.seconds(self.name, subject)
        return SuiteResult(self.name, subject.name, scores, rows, settings, seconds, leaks, remarks)


def said_again(text: str) -> float:
    """The share of an answer's runs of RUN words that stood in it before; 0 for fewer words."""
    words = words_of(text)
    runs = [tuple(words[place : place + RUN]) for place in range(len(words) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _answer(
    subject: Subject, context: Context, most: int
) -> Callable[[Sequence[Question], Callable[[int], None]], list[dict[str, Any]]]:
    """Answers questions, as Context.items asks: the first turns of all of them, then the second ones."""

    def work(block: Sequence[Question], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        said: list[list[Answer]] = [[] for _ in block]
        refused: dict[int, str] = {}
        for turn in range(max(len(one.turns) for one in block)):
            prompts: dict[int, list[int]] = {}
            for number, one in enumerate(block):
                if turn < len(one.turns) and number not in refused:
                    try:
                        prompts[number] = _prompt(subject, one, [answer.text for answer in said[number]])
                    except TemplateRefusal as refusal:  # of a second turn: its template takes one question
                        refused[number] = str(refusal)
            count = _Count(context, f"turn {turn + 1} answered", len(prompts))
            for temperature, numbers in _by_temperature(block, prompts, context.temperature).items():
                # A question has its own random numbers, whatever it is asked beside: a stopped call answers the same.
                seeds = [seed_of(context.seed, zlib.crc32(block[number].id.encode()), turn) for number in numbers]
                asked = [prompts[number] for number in numbers]
                drawn = subject.answers(asked, most, temperature=temperature, seeds=seeds, tick=count)
                for number, [answer] in zip(numbers, drawn, strict=True):
                    said[number].append(answer)
        tick(len(block))
        return [
            _row(one, answers, refused.get(number))
            for number, (one, answers) in enumerate(zip(block, said, strict=True))
        ]

    return work


class _Count:
    """Tells how many of some answers are there, when it is told how many more."""

    def __init__(self, context: Context, what: str, total: int):
        self.context, self.what, self.total, self.done = context, what, total, 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.context.report(self.what, self.done, self.total)


def _by_temperature(block: Sequence[Question], numbers: Iterable[int], given: float | None) -> dict[float, list[int]]:
    """Numbers of questions by what their answers are drawn with: as given, else each by its own."""
    found: dict[float, list[int]] = {}
    for number in numbers:
        found.setdefault(block[number].temperature if given is None else given, []).append(number)
    return found


def _prompt(subject: Subject, question: Question, answers: Sequence[str]) -> list[int]:
    """What a subject reads; TemplateRefusal of a second turn, UserError of a first one."""
    try:
        return _ids(subject, question.conversation(answers))
    except TemplateRefusal as refusal:
        if question.input:  # a template without a place for inputs
            return _ids(subject, question.conversation(answers, joined=True))
        if not answers:
            raise UserError(f"{question.id} cannot be asked: {refusal}") from refusal
        raise


def _ids(subject: Subject, turns: Conversation) -> list[int]:
    if subject.system:
        turns.insert(0, {"role": "system", "content": subject.system})
    return subject.renderer.prompt_ids(turns)


def _row(question: Question, answers: Sequence[Answer], refused: str | None) -> dict[str, Any]:
    """A question with its answers, as results keep it. `turns`: what was asked and said, for judges; `unasked`: why
    not all of its turns were asked; `reference`: its file's own answers, if it has any."""
    turns = [
        {"asked": asked, "answer": answer.text, "ended": answer.ended, "tokens": len(answer.tokens)}
        for asked, answer in zip(question.turns, answers, strict=False)
    ]
    if question.input:
        turns[0]["asked"] = question.asked
    values = {
        ENDED: sum(answer.ended == "end" for answer in answers) / len(answers),
        REPEATED: sum(said_again(answer.text) for answer in answers) / len(answers),
    }
    row: dict[str, Any] = {"id": question.id, "source": question.source, "category": question.category}
    row |= {"asked": _joined([turn["asked"] for turn in turns]), "answer": _joined([turn["answer"] for turn in turns])}
    row |= {"turns": turns, "values": values}
    if question.reference:
        row |= {"reference": list(question.reference), "wanted": _joined(question.reference)}
    return row | ({"unasked": refused} if refused is not None else {})


def _joined(texts: Sequence[Any]) -> str:
    """Several turns as one text for people, each with its number."""
    return str(texts[0]) if len(texts) == 1 else "\n\n".join(f"{place}. {text}" for place, text in enumerate(texts, 1))


def _of_source(row: dict[str, Any]) -> dict[str, Any]:
    return {f"{row['source']}: {name}": row["values"][name] for name in (ENDED, REPEATED)}


SUITE = Chat()
