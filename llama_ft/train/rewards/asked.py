"""An answer that is to be scored, and what it was scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_ft.data.examples import Conversation


@dataclass(frozen=True)
class Asked:
    """A prompt and one answer of the policy to it.

    `prompt`: the messages before the answer; `answer`: its text; `reference`: the row's own last answer, if it has one.
    `row`: what messages call the prompt's row. `ids`: prompt and answer as the policy's template wrote them; `ended`:
    whether the answer came to its end token, which is then the last of `ids`; `start`: index in `ids` of the answer.
    """

    prompt: Conversation
    answer: str
    reference: str | None
    row: str
    ids: Sequence[int]
    ended: bool
    start: int


@dataclass(frozen=True)
class Scored:
    """`parts`: the value of each reward by its name, before weights; `total`: the sum of weight · value."""

    total: float
    parts: dict[str, float]


class Judge(Protocol):
    """One entry of the recipe's `rewards`."""

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """One value for each answer, in order. Raises UserError with the row for what cannot be judged."""

    def fingerprint(self) -> Any:
        """What its values depend on beside its entry in the recipe, as JSON has it."""

    def close(self) -> None:
        """Ends what it started."""
