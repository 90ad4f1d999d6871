"""What all layouts share: a row while it is read, why rows are dropped, and who may speak after whom."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_ft.data.examples import Conversation, Message
from llama_ft.data.layouts.guess import classify
from llama_ft.data.problems import Problems, found
from llama_ft.errors import nearest

EMPTY_ANSWER = "empty answer"
EMPTY_TURN = "empty user turn"
EMPTY_TEXT = "empty text"
NO_ANSWER = "ends on the user"
ENDS_ON_TOOL = "ends on a tool's result"
NO_USER = "no user turn"
OUT_OF_ORDER = "roles out of order"
TWO_SYSTEMS = "two different system prompts"
BAD_CALL = "function call is not JSON"
SAME_ANSWERS = "chosen equals rejected"
OTHER_PROMPTS = "chosen and rejected answer different prompts"
RATED_LOWER = "chosen is rated below rejected"
RATED_ALIKE = "chosen and rejected are rated alike"

LEADING_ANSWER = "leading assistant turn removed"
"""A note, not a drop: the row is kept without that turn."""


@dataclass(frozen=True)
class Row:
    """A raw row while it is read. `columns` renames the layout's keys; `where` names the row in messages."""

    values: dict[str, Any]
    layout: str
    columns: Mapping[str, str]
    where: str
    problems: Problems

    def column(self, key: str) -> str:
        """What the layout's `key` is called in this data set."""
        return self.columns.get(key, key)

    def get(self, key: str) -> Any:
        """The value under the layout's `key`; None where it is absent."""
        return self.values.get(self.column(key))

    def has(self, key: str) -> bool:
        """Whether the row says something under the layout's `key`: null counts as absent."""
        return self.get(key) is not None

    def lacks(self, part: Any, place: str, keys: Sequence[str], others: Sequence[str], layout: str) -> bool:
        """Notes which of a turn's `keys` are missing; `others` are those that a turn of another `layout` has."""
        if not isinstance(part, dict):
            self.fault(f"{place}: found {found(part)}, expected an object with {', '.join(keys)}")
            return True
        missing = [key for key in keys if key not in part]
        for key in missing:
            match = nearest(key, map(str, part))
            hint = f"did you mean to write '{key}' for '{match}'?" if match else None
            if set(others) <= set(part):
                hint = f"{'/'.join(others)} is the {layout} layout: write layout: {layout}"
            self.fault(f"{place}: no {key}, found {found(part)}", hint)
        return bool(missing)

    def fault(self, what: str, hint: str | None = None) -> None:
        """Notes that this row is malformed."""
        self.problems.add(what, where=self.where, hint=hint)

    def require(self, *keys: str) -> bool:
        """Whether the row has all these keys (null included); notes what is missing, or which layout it has instead."""
        missing = [self.column(key) for key in keys if self.column(key) not in self.values]
        if missing:
            self._tell_missing(missing)
        return not missing

    def text(self, value: Any, place: str) -> str:
        """`value` if it is whole text; else a problem, and empty text that nobody sees."""
        if not isinstance(value, str):
            self.fault(f"{place}: found {found(value)}, expected text")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
            self.fault(f"{place}: found {half}, expected text", "the text was cut inside a character; repair the row")
        return value

    def optional_text(self, key: str) -> str:
        """The text under `key`; empty where it is absent or null."""
        return self.text(self.get(key), self.column(key)) if self.has(key) else ""

    def number(self, key: str) -> float | None:
        """The finite number under `key`, also where a table holds it as text; None where it is absent or null."""
        value = self.get(key)
        if value is None or value == "":
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.fault(f"{self.column(key)}: found {found(value)}, expected a number")
            return None
        return number

    def _tell_missing(self, missing: list[str]) -> None:
        seen = classify(self.values)
        if seen is not None and seen[0] != self.layout:
            what = f"found {found(self.values)}: the {seen[0]} layout, expected {self.layout}"
            self.fault(what, f"write layout: {seen[0]}, or keep one layout per file")
            return
        for name in missing:
            spelt = seen[1].get(name) if seen is not None else None
            match = spelt or nearest(name, map(str, self.values))
            hint = f"did you mean '{match}'? A card can rename it: columns" if match else "a card can rename columns"
            self.fault(f"no {name}, found {found(self.values)}", hint)


def json_value(row: Row, text: str, place: str, kind: str) -> Any:
    """JSON written as text, decoded; None, and a problem, where it is no JSON."""
    try:
        value = decode(text)
    except ValueError:
        row.fault(f"{place}: found {found(text)}, expected {kind}")
        return None
    return value


def decode(text: str) -> Any:
    """Strict JSON; raises ValueError for anything else, halves of characters and NaN among it."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def whole(value: Any) -> bool:
    """Whether a decoded value can be written as JSON again: no half characters, no NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def misplaced(turns: Conversation) -> tuple[int, str] | None:
    """The first message that may not stand where it does, by index, and why; None for a conversation in order.

    In order: an optional system message, then user and assistant in turn. An assistant that calls tools is followed by
    their results, one tool message or several, and speaks again.
    """
    before: Message | None = None
    for i, message in enumerate(turns):
        role = message["role"]
        expected = _followers(before)
        if role not in expected:
            return i, _why(before, role, expected[-1])
        before = message
    return None


def _followers(before: Message | None) -> tuple[str, ...]:
    if before is None:
        return ("system", "user")
    if before["role"] == "tool":
        return ("tool", "assistant")
    if before["role"] == "assistant":
        return ("tool",) if before.get("tool_calls") else ("user",)
    return ("user",) if before["role"] == "system" else ("assistant",)


def _why(before: Message | None, role: str, expected: str) -> str:
    if role == "system":
        return "a system message stands first, or not at all"
    if role == "tool":
        return "a tool's result, but nothing called a tool"
    if before is None or before["role"] == "system":
        return f"the {role} speaks first, expected a user message"
    if expected == "tool":
        return f"found the {role}, expected the result of the tool that was called"
    if before["role"] == role:
        return f"two {role} messages in a row, expected {expected}"
    return f"found the {role}, expected {expected}"


def why_drop(conversation: Conversation) -> str | None:
    """Why an ordered conversation has nothing to teach; None if it has. A tool's result may be empty."""
    last = conversation[-1]["role"]
    if last == "user":
        return NO_ANSWER
    if last == "tool":
        return ENDS_ON_TOOL
    for message in conversation:
        if message["content"].strip() or message.get("input", "").strip():
            continue
        if message["role"] == "assistant" and not message.get("tool_calls"):
            return EMPTY_ANSWER
        if message["role"] == "user":
            return EMPTY_TURN
    return None


def unlearnt(prompt: Conversation) -> Conversation:
    """A prompt whose own answers carry no loss: what is learnt is the answer that follows it."""
    return [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]


def dialogue(system: str, turns: Conversation) -> Conversation:
    """`turns` after a system prompt. An empty system prompt says nothing; many sets fill the column with ""."""
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    return [{"role": "system", "content": system}, *turns] if system.strip() else turns
