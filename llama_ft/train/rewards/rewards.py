"""What a recipe's `rewards` give an answer: each entry its value, and the sum of weight times value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.recipe.schema_online import Reward
from llama_ft.train.rewards.asked import Asked, Judge, Scored
from llama_ft.train.rewards.function import Code, ExactMatch, Length, Pattern, UserFunction
from llama_ft.train.rewards.worker import Worker

if TYPE_CHECKING:
    import torch

    from llama_ft.recipe.schema import Recipe

__all__ = ["Asked", "Rewards", "Scored"]


class Rewards:
    """The entries of a recipe, open. A context manager.

    Names of parts are those of the functions and of the models' folders; one that comes again has a number behind it.
    """

    def __init__(self, entries: Sequence[Reward], judges: Sequence[Judge]):
        self._judges = list(judges)
        self._weights = [float(entry.weight) for entry in entries]
        self.names = distinct([name_of(entry) for entry in entries])

    @classmethod
    def open(cls, recipe: Recipe, device: torch.device) -> Rewards:
        """Loads the models onto `device` and imports the users' files.

        UserError with all that is wrong in any entry; MachineFault where a process cannot be started.
        """
        worker = Worker()
        judges: list[Judge] = []
        problems: list[Problem] = []
        try:
            for number, entry in enumerate(recipe.rewards):
                try:
                    judges.append(_judge(entry, f"rewards.{number}", worker, device))
                except MachineFault:
                    raise
                except UserError as error:
                    problems += error.problems
            if problems:
                raise UserError(problems)
        except BaseException:
            for judge in judges:
                judge.close()
            worker.close()
            raise
        return cls(recipe.rewards, judges)

    def score(self, asked: Sequence[Asked]) -> list[Scored]:
        """What each answer is worth, in order.

        UserError with reward and row for what cannot be judged, and for a value that is no number.
        """
        columns: list[list[float]] = []
        for number, (name, judge) in enumerate(zip(self.names, self._judges, strict=True)):
            values = judge.values(asked)
            for one, value in zip(asked, values, strict=True):
                if not math.isfinite(value):
                    what = f"reward {name} gave an answer the value {value}, which is no number to learn from"
                    raise UserError(what, where=one.row, key=f"rewards.{number}")
            columns.append(values)
        scored = []
        for parts in zip(*columns, strict=True):
            total = math.fsum(weight * value for weight, value in zip(self._weights, parts, strict=True))
            scored.append(Scored(total, dict(zip(self.names, parts, strict=True))))
        return scored

    def fingerprint(self) -> dict[str, Any]:
        """What the values depend on beside the recipe: hashes of weights, templates and users' files, by name."""
        return {name: judge.fingerprint() for name, judge in zip(self.names, self._judges, strict=True)}

    def close(self) -> None:
        """Ends the processes that they started."""
        for judge in self._judges:
            judge.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def name_of(entry: Reward) -> str:
    """What the entry's part is called: the function's name, or the last part of the model's path."""
    if entry.model is not None:
        parts = [part for part in Path(entry.model).parts if part != "merged"]  # every run's folder of weights
        return parts[-1] if parts else entry.model
    return str(entry.function).rpartition(":")[2]


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with `-2`, `-3` … behind those that were there before."""
    found: list[str] = []
    for name in names:
        free, number = name, 1
        while free in found:
            number += 1
            free = f"{name}-{number}"
        found.append(free)
    return found


def _judge(entry: Reward, key: str, worker: Worker, device: torch.device) -> Judge:
    """One entry of the recipe, which was checked (recipe/check_online.py)."""
    timeout = float(entry.timeout)
    if entry.model is not None:
        from llama_ft.train.rewards.scorer import Scorer

        return Scorer.open(entry.model, device, key=f"{key}.model")
    if entry.function == "exact_match":
        return ExactMatch()
    if entry.function == "length":
        assert entry.target is not None
        return Length(entry.target)
    if entry.function == "format":
        assert entry.pattern is not None
        return Pattern(entry.pattern, timeout, worker, f"{key}.pattern")
    if entry.function == "code":
        return Code(timeout)
    return UserFunction.open(str(entry.function), timeout, worker, f"{key}.function")
