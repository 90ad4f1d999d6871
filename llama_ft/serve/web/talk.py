"""A conversation as the page keeps it: in the browser, so that the server remembers nobody.

The browser sends it with each question and gets it back with the answer, as JSON:
`{"system": str, "sides": [{"said": [messages], "forgotten": int}, …]}`, one side per model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from llama_ft.data.examples import Conversation


class Malformed(Exception):
    """What came from the browser is no conversation of this page."""


@dataclass
class Side:
    """What one model was asked and has said. The first `forgotten` messages no longer fit its context."""

    said: Conversation = field(default_factory=list)
    forgotten: int = 0


@dataclass
class Talk:
    """A conversation with each of the page's models, under one system prompt ("" for none)."""

    system: str
    sides: list[Side]

    @classmethod
    def new(cls, count: int, system: str = "") -> Talk:
        """Nothing said yet, with `count` models."""
        return cls(system, [Side() for _ in range(count)])

    @classmethod
    def read(cls, value: Any, count: int) -> Talk:
        """The conversation from the browser's JSON; None is a new one. Raises Malformed for anything else."""
        if value is None:
            return cls.new(count)
        try:
            system, sides = value["system"], [Side(_turns(one["said"]), one["forgotten"]) for one in value["sides"]]
            whole = all(isinstance(one.forgotten, int) and 0 <= one.forgotten <= len(one.said) for one in sides)
        except (TypeError, KeyError) as error:
            raise Malformed("The conversation cannot be read: start a new one.") from error
        if not isinstance(system, str) or len(sides) != count or not whole:
            raise Malformed("The conversation belongs to another page: start a new one.")
        return cls(system, sides)

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"system": self.system, "sides": [{"said": one.said, "forgotten": one.forgotten} for one in self.sides]}

    @property
    def empty(self) -> bool:
        """Whether no model has said anything."""
        return not any(side.said for side in self.sides)


def _turns(messages: Any) -> Conversation:
    """User and assistant in turn, complete. Raises Malformed."""
    turns: Conversation = []
    for number, message in enumerate(messages):
        role = ("user", "assistant")[number % 2]
        if message["role"] != role or not isinstance(message["content"], str):
            raise Malformed("The conversation cannot be read: start a new one.")
        turns.append({"role": role, "content": message["content"]})
    if len(turns) % 2:
        raise Malformed("The conversation cannot be read: start a new one.")
    return turns


def as_rows(talk: Talk, names: list[str]) -> str:
    """JSON lines in the layout `messages`, one row per model that said something: what `data: [{path: …}]` reads."""
    rows = []
    for name, side in zip(names, talk.sides, strict=True):
        if side.said:
            system: Conversation = [{"role": "system", "content": talk.system}] if talk.system else []
            rows.append(json.dumps({"messages": [*system, *side.said], "model": name}, ensure_ascii=False) + "\n")
    return "".join(rows)


def as_markdown(talk: Talk, names: list[str]) -> str:
    """The conversation to read: a part per model, a heading per message."""
    parts = []
    for name, side in zip(names, talk.sides, strict=True):
        if not side.said:
            continue
        parts.append(f"# {name}")
        if talk.system:
            parts.append(f"## System\n\n{talk.system}")
        for message in side.said:
            parts.append(f"## {message['role'].capitalize()}\n\n{message['content']}")
    return "\n\n".join(parts) + "\n"
