"""Suite `judge`: how good the answers are that suite `chat` kept, in the opinion of a judge.

Answers are graded one by one, or held against those of the run's base (or of a file), question by question. What was
judged is kept as it comes: a verdict that was paid for is not asked for again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.chat.judges import Case, Judge, Opinion, Turns, open_judge
from llama_ft.evaluate.chat.questions import REFERRED, references, rows_of
from llama_ft.evaluate.material import kind_of
from llama_ft.evaluate.result import SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

AT_ONCE = 8
"""Questions that are judged and kept together: what a kill can cost."""
UNREAD, SWAYED = "verdicts that say nothing", "verdicts that follow the order"


class Judged:
    """See the module."""

    name = "judge"
    about = "a judge's opinion (--judge) of the answers of suite chat: an endpoint's model, or a reward model"
    kinds = ("references",)

    def needs(self, context: Context) -> list[Problem]:
        """A judge that can be asked, references that can be read, and for pairs somebody to be held against."""
        judging = context.judging
        if judging is None:
            hint = "--judge MODEL for an OpenAI-compatible endpoint, or --judge FOLDER of a reward model"
            return [Problem("suite judge needs a judge", key="--judge", hint=hint)]
        problems: list[Problem] = []
        if judging.against is not None and not judging.pairs:
            hint = "with --pairs answers are held against them"
            problems.append(Problem("grades are given to answers by themselves", key="--against", hint=hint))
        if judging.pairs and judging.against is None and context.run is None:
            hint = "--against FILE: answers of another model (its eval/chat-NAME.json, or a file of AlpacaEval)"
            problems.append(Problem("a model by itself has no base to be held against", key="--pairs", hint=hint))
        for read in (lambda: references(context), lambda: judging.against and others_of(judging.against)):
            try:
                read()
            except UserError as error:
                problems += error.problems
        if not problems:
            try:
                _judge(context)
            except UserError as error:
                problems += error.problems
        return problems

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Judges one subject's answers; see suites.Suite. UserError where there are none, or of other weights."""
        judging, judge = context.judging, _judge(context)
        assert judging is not None
        chat = _answers(context, subject.name)
        if chat.settings["weights"] != subject.fingerprint:
            hint = "answer again: --suite chat,judge --overwrite"
            raise UserError(f"the answers of {subject.name} were given by other weights", hint=hint)
        against = "base" if judging.against is None else judging.against.stem
        others = _others(context, subject, judging.against) if judging.pairs else None
        if judging.pairs and others is None:
            settings = context.settings(self.name, subject, **judge.settings(), pairs=True, against=None)
            return SuiteResult(
                self.name, subject.name, [], [], settings, 0.0, remarks=["the others are held against it"]
            )
        cases, remarks = _cases(chat, others, references(context) if _referred(context) else {})
        said = [[case.id, case.turns, case.others, list(case.reference)] for case in cases]
        settings = context.settings(
            self.name,
            subject,
            **judge.settings(),
            pairs=judging.pairs,
            against=against if judging.pairs else None,
            answers=hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16],
        )
        names = _Names(judge.measure, against, pairs=judging.pairs)
        rows = context.items(subject, settings, "judged", cases, _work(judge, names), at_once=AT_ONCE)
        sources = list(dict.fromkeys(row["id"].rpartition(":")[0] for row in rows))
        if len(sources) > 1:
            rows = [row | {"values": _with_source(row["values"], row["id"])} for row in rows]
        scores = [
            score
            for prefix in ("", *(f"{source}: " for source in sources if len(sources) > 1))
            for name, unit, better in names.scores
            if (score := scored(rows, prefix + name, unit, better, context.seed)).rows
        ]
        seconds = context.seconds(self.name, subject)
        return SuiteResult(self.name, subject.name, scores, rows, settings, seconds, remarks=remarks)


class _Names:
    """What scores are called, by what is judged."""

    def __init__(self, measure: str, against: str, *, pairs: bool):
        self.main = f"win rate against {against}" if pairs else measure
        unit = "share" if pairs else ""
        turns = [(f"{self.main}, turn {turn}", unit, "higher") for turn in (1, 2)]
        self.scores: list[tuple[str, str, Any]] = [(self.main, unit, "higher"), *turns]
        self.scores += [(UNREAD, "share", "lower"), (SWAYED, "share", "lower")]

    def values(self, opinions: Sequence[Opinion]) -> dict[str, float]:
        """A row's own values: means over its turns, those that say nothing left out and counted."""
        found: dict[str, float] = {}
        valid = [one.value for one in opinions if one.value is not None]
        if valid:
            found[self.main] = sum(valid) / len(valid)
        if len(opinions) > 1:
            for turn, one in enumerate(opinions, 1):
                if one.value is not None:
                    found[f"{self.main}, turn {turn}"] = one.value
        if any(one.words for one in opinions):
            found[UNREAD] = 1 - len(valid) / len(opinions)
        orders = [one.swayed for one in opinions if one.swayed is not None]
        if orders:
            found[SWAYED] = sum(orders) / len(orders)
        return found


def _judge(context: Context) -> Judge:
    """The judge of this call, opened once."""
    assert context.judging is not None
    if context.judge is None:
        context.judge = open_judge(context.judging)
    return context.judge


def _work(judge: Judge, names: _Names) -> Callable[[Sequence[Case], Callable[[int], None]], list[dict[str, Any]]]:
    def work(cases: Sequence[Case], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        rows = []
        for case, opinions in zip(cases, judge.opinions(cases, tick), strict=True):
            words = [word for one in opinions for word in one.words]
            asked = "\n\n".join(str(turn["asked"]) for turn in case.turns)
            row = {"id": case.id, "category": case.category, "asked": asked, "answer": "\n\n".join(words)}
            opinion = [{"value": one.value, "words": list(one.words), "swayed": one.swayed} for one in opinions]
            rows.append({**row, "opinions": opinion, "values": names.values(opinions)})
        return rows

    return work


def _answers(context: Context, subject: str) -> SuiteResult:
    path = context.path("chat", subject)
    if not path.is_file():
        hint = "--suite chat,judge, with --data of questions"
        raise UserError(f"{subject} has no answers to be judged", where=str(path), hint=hint)
    return SuiteResult.read(path)


def _others(context: Context, subject: Subject, against: Path | None) -> dict[str, Turns] | None:
    """The opponent's turns by question; None for the base, which is the opponent itself."""
    if against is not None:
        return others_of(against)
    if subject.name == "base":
        return None
    return {str(row["id"]): row["turns"] for row in _answers(context, "base").rows}


def others_of(path: Path) -> dict[str, Turns]:
    """Answers of another model by question: a result of suite chat, by its ids; or a list of `instruction` and
    `output`, as AlpacaEval has them, by what is asked. UserError for anything else."""
    if not path.is_file():
        raise UserError(f"there is no file {path}", key="--against")
    problems: list[Problem] = []
    rows = [row for _, row in rows_of(path, problems)] if kind_of(str(path)) == "questions" else []
    if rows and all({"instruction", "output"} <= row.keys() for row in rows) and not problems:
        return {row["instruction"]: [{"asked": row["instruction"], "answer": str(row["output"])}] for row in rows}
    try:
        result = SuiteResult.read(path)
        return {str(row["id"]): row["turns"] for row in result.rows}
    except (UserError, KeyError) as error:
        hint = "a run's or model's eval/chat-NAME.json, or a file of AlpacaEval"
        raise UserError("no answers of suite chat", where=str(path), key="--against", hint=hint) from error


def _cases(
    chat: SuiteResult, others: dict[str, Turns] | None, known: dict[str, tuple[str, ...]]
) -> tuple[list[Case], list[str]]:
    """What is to be judged, and what to know of it."""
    pairs = others is not None
    found, lonely, unasked, bare = [], 0, 0, 0
    for row in chat.rows:
        reference = known.get(str(row["id"]).rpartition(":")[2], tuple(row.get("reference", ())))
        other = (others.get(str(row["id"])) or others.get(str(row["asked"]))) if others is not None else None
        if pairs and other is None:
            lonely += 1
            continue
        unasked += "unasked" in row
        category = str(row.get("category", ""))
        found.append(Case(str(row["id"]), category, row["turns"], other, reference))
        bare += category in REFERRED and not reference
    remarks = []
    if lonely:
        remarks.append(f"{lonely} of {len(chat.rows)} questions were not asked of the other: they are left out")
    if unasked:
        remarks.append(f"of {unasked} questions the first turn alone is judged: its template takes one")
    if bare:
        remarks.append(f"{bare} questions of math, reasoning and coding are judged without a reference answer (--data)")
    if pairs and not found:
        raise UserError("none of the questions was asked of both", key="--pairs", hint="answer the same --data files")
    return found, remarks


def _referred(context: Context) -> bool:
    return any(kind_of(name) == "references" for name in context.data)


def _with_source(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Values with those of the row's own file beside them."""
    source = name.rpartition(":")[0]
    own = {name: value for name, value in values.items() if not name.startswith(f"{source}: ")}
    return own | {f"{source}: {name}": value for name, value in own.items()}


SUITE = Judged()
