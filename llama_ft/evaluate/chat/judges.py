"""Who judges: a model behind an endpoint, or a reward model. Either gives an opinion of each turn of a question."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llama_ft.data.examples import Conversation
from llama_ft.errors import UserError
from llama_ft.evaluate.chat.endpoint import Endpoint, Reply
from llama_ft.evaluate.chat.prompts import PROMPTS, JudgePrompt, choice_of, grade_of, read_prompts, written
from llama_ft.evaluate.chat.questions import REFERRED

TURNS = 2
"""That are judged of a conversation: FastChat's prompts know two."""
Turns = Sequence[Mapping[str, Any]]
"""Of a row of suite chat: each with `asked` and `answer`."""
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Judging:
    """What a user asked for. judge: a model's name at the endpoint, or a reward model (a run or its folder); url: of
    the endpoint; prompts: a file in FastChat's format; pairs: which of two answers is better, in place of grades;
    against: a file with the other answers, in place of those of the run's base."""

    judge: str
    url: str | None = None
    prompts: Path | None = None
    pairs: bool = False
    against: Path | None = None


@dataclass(frozen=True)
class Case:
    """One question's answers to be judged. turns: what was asked and said; others: what the opponent said to the same;
    None where answers are graded. reference: answers to its turns."""

    id: str
    category: str
    turns: Turns
    others: Turns | None = None
    reference: Sequence[str] = ()

    @property
    def judged(self) -> int:
        """Turns that can be judged: those that both answered."""
        return min(TURNS, len(self.turns), TURNS if self.others is None else len(self.others))


@dataclass(frozen=True)
class Opinion:
    """A judge's of one turn. `value`: the grade, the reward, or 1, ½, 0 of a pair; None: its words say none. words: its
    own; swayed: whether it named the same place, not the same answer, when the order was turned round."""

    value: float | None
    words: Sequence[str] = ()
    swayed: bool | None = None


class Judge(Protocol):
    """An open judge."""

    measure: str
    """What its values of single answers are called."""

    def settings(self) -> dict[str, Any]:
        """What its verdicts depend on, as JSON has it."""
        ...

    def opinions(self, cases: Sequence[Case], tick: Tick) -> list[list[Opinion]]:
        """Of each case one opinion per turn. `tick` is told how many more cases are done."""
        ...


def open_judge(judging: Judging) -> Judge:
    """The judge that is named. UserError where there is none of that name, or it cannot be asked."""
    named = next(
        (path for path in (Path(judging.judge).expanduser(), Path("runs", judging.judge)) if path.is_dir()), None
    )
    if named is None:
        if judging.judge.startswith(("./", "../", "/", "~", "runs/")):
            raise UserError(f"there is no folder {judging.judge}", key="--judge", hint="a reward model's run or folder")
        prompts = PROMPTS if judging.prompts is None else read_prompts(judging.prompts)
        return TextJudge(Endpoint.open(judging.judge, judging.url), prompts)
    if judging.url is not None or judging.prompts is not None:
        what = f"{judging.judge} is a folder: a reward model has no endpoint and reads no prompts"
        raise UserError(what, key="--judge-url" if judging.url is not None else "--judge-prompts", hint="leave it out")
    import torch

    from llama_ft.train.rewards.scorer import Scorer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return RewardJudge(Scorer.open(str(named), device, key="--judge"))


class TextJudge:
    """A model that is asked in words, of pairs in both orders."""

    measure = "grade"

    def __init__(self, endpoint: Endpoint, prompts: Mapping[str, JudgePrompt]):
        self.endpoint, self.prompts = endpoint, prompts

    def settings(self) -> dict[str, Any]:
        """See Judge. The address is left out: the same version is the same judge anywhere."""
        words = json.dumps({name: [one.system, one.template] for name, one in self.prompts.items()}, sort_keys=True)
        asked = {"judge": self.endpoint.model, "version": self.endpoint.version, **self.endpoint.spoken}
        return asked | {"prompts": hashlib.sha256(words.encode()).hexdigest()[:16]}

    def opinions(self, cases: Sequence[Case], tick: Tick) -> list[list[Opinion]]:
        """See Judge. A pair is won where both orders say so; where they do not agree it is a tie, as in FastChat."""
        requests: list[list[dict[str, str]]] = []
        owners: list[int] = []
        for number, case in enumerate(cases):
            own = [request for turn in range(case.judged) for request in self._requests(case, turn)]
            requests += own
            owners += [number] * len(own)
        left = Counter(owners)

        def came(request: int) -> None:
            left[owners[request]] -= 1
            if not left[owners[request]]:
                tick(1)

        replies = iter(self.endpoint.ask(requests, came))
        return [
            [
                _grade(next(replies)) if case.others is None else _verdict(next(replies), next(replies))
                for _ in range(case.judged)
            ]
            for case in cases
        ]

    def _requests(self, case: Case, turn: int) -> list[list[dict[str, str]]]:
        """What a turn is judged by: one request for a grade, two for a pair."""
        referred = case.category in REFERRED and len(case.reference) > turn
        pair = case.others is not None
        name = ("pair" if pair else "single") + ("-math-v1" if referred else "-v2" if pair else "-v1")
        prompt = self.prompts[name + ("-multi-turn" if turn else "")]
        fields = (
            {f"ref_answer_{place}": text for place, text in enumerate(case.reference[:TURNS], 1)} if referred else {}
        )
        fields |= {f"question_{place}": str(one["asked"]) for place, one in enumerate(case.turns[:TURNS], 1)}
        fields["question"] = str(case.turns[0]["asked"])
        if case.others is None:
            return [written(prompt, fields | _said("answer", case.turns))]
        orders = ((case.turns, case.others), (case.others, case.turns))
        return [written(prompt, fields | _said("answer_a", a) | _said("answer_b", b)) for a, b in orders]


def _said(name: str, turns: Turns) -> dict[str, str]:
    """Fields of one side's answers: `answer`, `answer_1`, `answer_2`."""
    said = {f"{name}_{place}": str(one["answer"]) for place, one in enumerate(turns[:TURNS], 1)}
    return {name: said[f"{name}_1"], **said}


def _grade(reply: Reply) -> Opinion:
    return Opinion(grade_of(reply.text), [_words(reply)])


def _verdict(first: Reply, turned: Reply) -> Opinion:
    """Of a pair asked in both orders: in the first one the judged answer is A, in the other it is B."""
    words = [_words(first), _words(turned)]
    one, other = choice_of(first.text), choice_of(turned.text)
    if one is None or other is None:
        return Opinion(None, words)
    values = {"A": 1.0, "B": 0.0, "C": 0.5}[one], {"A": 0.0, "B": 1.0, "C": 0.5}[other]
    return Opinion(values[0] if values[0] == values[1] else 0.5, words, swayed=one == other != "C")


def _words(reply: Reply) -> str:
    return reply.text if reply.refused is None else f"(the endpoint refused: {reply.refused})"


class RewardJudge:
    """A reward model: of a pair the answer with the higher reward is the better one."""

    measure = "reward"

    def __init__(self, scorer: Any):
        self.scorer = scorer

    def settings(self) -> dict[str, Any]:
        """See Judge."""
        weights = self.scorer.model.score.weight
        return {"judge": "reward model", "version": self.scorer.fingerprint(), "judged_on": weights.device.type}

    def opinions(self, cases: Sequence[Case], tick: Tick) -> list[list[Opinion]]:
        """See Judge."""
        found = []
        for case in cases:
            own = self._rewards(case.id, case.turns, case.judged)
            if case.others is None:
                found.append([Opinion(value) for value in own])
            else:
                other = self._rewards(case.id, case.others, case.judged)
                pairs = zip(own, other, strict=True)
                found.append(
                    [Opinion(1.0 if a > b else 0.0 if a < b else 0.5, [f"{a:.3f}, {b:.3f}"]) for a, b in pairs]
                )
            tick(1)
        return found

    def _rewards(self, name: str, turns: Turns, count: int) -> list[float]:
        from llama_ft.train.rewards.asked import Asked

        asked = []
        before: Conversation = []
        for turn in turns[:count]:
            before = [*before, {"role": "user", "content": str(turn["asked"])}]
            said = str(turn["answer"])
            asked.append(Asked(before, said, None, name, [], turn.get("ended") == "end", 0))
            before = [*before, {"role": "assistant", "content": said}]
        try:
            return [float(value) for value in self.scorer.values(asked)]
        except UserError as error:  # its hints are for training
            hint = "have shorter answers judged (--max-tokens), or another judge"
            raise UserError([replace(problem, hint=hint) for problem in error.problems]) from error
