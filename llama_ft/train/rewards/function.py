"""Rewards that are functions: the built-in ones, and FILE.py:NAME.

Patterns and users' functions are called in another process, for at most `timeout` seconds an answer: what raises, hangs
or dies there ends the run with its name, the row, and the line of the user's own file.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError, did_you_mean, nearest
from llama_ft.sandbox.fences import code_in, tests_in
from llama_ft.sandbox.programs import Sandbox
from llama_ft.train.rewards.asked import Asked
from llama_ft.train.rewards.worker import Died, Hung, Worker

IMPORT = 120.0
"""Seconds that a user's file may take to be imported: it may bring large libraries."""

# 1,234.5, -3, .5, 2e-3, 1/2. A minus is a sign only where no number or word stands before it.
_PLAIN = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?{_PLAIN}(?:/{_PLAIN})*")
_LONGEST = 100
"""Characters of a number that is read as one; a longer run of digits is compared as text."""
_LARGEST = 3
"""Digits of an exponent: likewise."""


class ExactMatch:
    """1 where the answer is the row's own, else 0.

    Compared is the last number of each (1,234 = 1234.0 = 2468/2); where the row's own answer has none, the whole text,
    but for white space and case.
    """

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """0 or 1 each. UserError for a row without an answer of its own."""
        return [float(matches(one.answer, _reference(one, "exact_match"))) for one in asked]

    def fingerprint(self) -> Any:
        """Nothing but the recipe."""

    def close(self) -> None:
        """Nothing was started."""


def matches(answer: str, reference: str) -> bool:
    """Whether the last numbers are equal, or, where `reference` has none, the texts."""
    wanted = last_number(reference)
    if wanted is None:
        return " ".join(answer.split()).casefold() == " ".join(reference.split()).casefold()
    return last_number(answer) == wanted


def last_number(text: str) -> Fraction | str | None:
    """The last number of a text, exactly; None where there is none.

    A thousands comma, a decimal point, an exponent and a fraction are read; a currency or a percent sign is left out.
    """
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return None
    parts = found[-1].replace(",", "").split("/")
    last = _value(parts[-1])
    above = _value(parts[0]) if len(parts) == 2 else last  # of a date the year is taken
    if len(parts) == 2 and isinstance(above, Fraction) and isinstance(last, Fraction) and last:
        return above / last
    return last


def _value(written: str) -> Fraction | str:
    """One plain number; as text where it is too long to be worked out."""
    exponent = re.search("[eE][+-]?([0-9]+)", written)
    if len(written) > _LONGEST or (exponent and len(exponent[1]) > _LARGEST):
        return written
    return Fraction(Decimal(written))


@dataclass(frozen=True)
class Length:
    """−|tokens − target| / target, at least −1: 0 at the target, −1 from twice as many on.

    Counted are the tokens of the answer as the policy wrote it, its end token among them.
    """

    target: int

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """From −1 to 0 each."""
        counts = [len(one.ids) - one.start for one in asked]
        return [-min(1.0, abs(count - self.target) / self.target) for count in counts]

    def fingerprint(self) -> Any:
        """Nothing but the recipe."""

    def close(self) -> None:
        """Nothing was started."""


class Code:
    """1 where the code of the answer, with the row's own answer as tests behind it, runs to its end, else 0."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._sandbox = Sandbox()

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """0 or 1 each. UserError for a row whose tests are no Python."""
        programs = []
        for one in asked:
            try:
                programs.append((code_in(one.answer), tests_in(_reference(one, "code"))))
            except ValueError as reason:
                what = f"reward code: the row's own answer is not Python that tests an answer: {reason}"
                raise UserError(what, where=one.row) from reason
        return [float(outcome == "passed") for outcome in self._sandbox.run(programs, self.timeout)]

    def fingerprint(self) -> Any:
        """The Python that runs the programs."""
        return platform.python_version()

    def close(self) -> None:
        """Ends its threads."""
        self._sandbox.close()


@dataclass(frozen=True)
class Pattern:
    """1 where the whole answer matches a regex of Python's `re` (fullmatch), else 0."""

    pattern: str
    timeout: float
    worker: Worker
    key: str

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """0 or 1 each. UserError for one that takes longer than `timeout`."""
        return [self._value(one) for one in asked]

    def _value(self, one: Asked) -> float:
        try:
            return self.worker.ask({"pattern": self.pattern, "text": one.answer}, self.timeout)["value"]
        except Hung:
            what = f"reward format: the pattern {self.pattern!r} was not done with an answer in {self.timeout:g} s"
            hint = "repetitions within repetitions take for ever: write it without, or with (?>…)"
            raise UserError(what, where=one.row, key=self.key, hint=hint) from None
        except Died as how:
            what = f"reward format: the pattern {self.pattern!r} {how}"
            raise UserError(what, where=one.row, key=self.key) from None

    def fingerprint(self) -> Any:
        """Nothing but the recipe."""

    def close(self) -> None:
        """Ends the process that it shares."""
        self.worker.close()


@dataclass(frozen=True)
class UserFunction:
    """`NAME(prompt, answer, reference) -> float` in a file of the user's.

    `prompt`: list of messages, each a dict with `role` and `content`; `answer`: str; `reference`: str or None.
    """

    file: Path
    name: str
    timeout: float
    worker: Worker
    key: str

    @classmethod
    def open(cls, text: str, timeout: float, worker: Worker, key: str) -> UserFunction:
        """Finds and imports `FILE.py:NAME`. UserError with file:line for what is wrong with it."""
        path, _, name = text.rpartition(":")
        file = Path(path).expanduser().resolve()
        if not file.is_file():
            beside = [entry.name for entry in file.parent.glob("*.py")] if file.parent.is_dir() else []
            near = nearest(file.name, beside)
            hint = f"did you mean '{near}'?" if near else "give it as FILE.py:NAME"
            raise UserError(f"no such file of reward functions: {path}", key=key, hint=hint)
        function = cls(file, name, timeout, worker, key)
        function._ask({"open": str(file), "name": name}, IMPORT, None)
        return function

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """What it returns for each. UserError where it raises, hangs, dies or returns no number."""
        values = []
        for one in asked:
            arguments = [one.prompt, one.answer, one.reference]
            request = {"call": str(self.file), "name": self.name, "arguments": arguments}
            values.append(self._ask(request, self.timeout, one.row)["value"])
        return values

    def _ask(self, request: dict[str, Any], seconds: float, row: str | None) -> dict[str, Any]:
        """The worker's answer, or its fault as a UserError: at the row, or at the file's line where there is none."""
        said = f"reward {self.file.name}:{self.name}"
        doing = "imported" if row is None else "done with an answer"
        try:
            answer = self.worker.ask(request, seconds)
        except Hung:
            hint = "it was ended with all that it started; rewards.N.timeout says how long it may take"
            what = f"{said} was not {doing} in {seconds:g} s"
            raise UserError(what, where=row or str(self.file), key=self.key, hint=hint) from None
        except Died as how:
            raise UserError(f"{said} {how}", where=row or str(self.file), key=self.key) from None
        if "fault" not in answer:
            return answer
        at = f"{self.file}:{answer['line']}" if answer.get("line") else str(self.file)
        near = did_you_mean(self.name, answer["names"], kind="functions") if answer["names"] else None
        what = f"{said}: {answer['fault']}" if row is None else f"{said} {answer['fault']} ({at})"
        raise UserError(what, where=row or at, key=self.key, hint=near)

    def fingerprint(self) -> Any:
        """SHA-256 of the file, in hex; what it imports in turn is not looked at."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def close(self) -> None:
        """Ends the process that it shares."""
        self.worker.close()


def _reference(one: Asked, function: str) -> str:
    if one.reference is None:
        what = f"reward {function}: the row has no answer of its own to compare with"
        raise UserError(what, where=one.row, hint="its last message must be the assistant's")
    return one.reference
