"""preference: one prompt, a better and a worse answer, in the five shapes that sets publish them in.

However it is written, a pair becomes prompt + chosen and prompt + rejected. The prompt's own answers carry no loss: a
pair teaches the difference between its two ends alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llama_ft.data.examples import Conversation, Example
from llama_ft.data.layouts.alpaca import alpaca_prompt
from llama_ft.data.layouts.chat import in_order, one_system, read_message, read_turns
from llama_ft.data.layouts.common import (
    OTHER_PROMPTS,
    OUT_OF_ORDER,
    RATED_ALIKE,
    RATED_LOWER,
    SAME_ANSWERS,
    Row,
    dialogue,
    misplaced,
    unlearnt,
    why_drop,
)
from llama_ft.data.layouts.pairs import is_log, spoken
from llama_ft.data.layouts.sharegpt import read_log, read_turn, settle
from llama_ft.data.layouts.tools import read_tools
from llama_ft.data.problems import found

# HH-RLHF's turns: a blank line, the speaker, a colon and one space, which is no part of what is said.
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_HUMAN = "\n\nHuman:"

_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)


@dataclass(frozen=True)
class _Pair:
    """Two ends of one prompt; `dropped` where the pair teaches nothing."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation
    dropped: str | None = None
    notes: tuple[str, ...] = ()


def read_preference(row: Row) -> Example | None:
    """A pair of answers; `margin`, or the difference of two scores, says by how much one was liked better."""
    if not row.require("chosen", "rejected"):
        return None
    before = row.problems.count
    pair, tools, margin = _pair(row), read_tools(row), _margin(row)
    if row.problems.count > before or pair is None:
        return None
    prompt = unlearnt(pair.prompt)
    better, worse = [*prompt, *pair.chosen], [*prompt, *pair.rejected]
    dropped = pair.dropped
    if dropped is None:
        for key, conversation in (("chosen", better), ("rejected", worse)):
            if not in_order(row, conversation, row.column(key), len(prompt)):
                return None
        if pair.chosen == pair.rejected:
            dropped = SAME_ANSWERS
        elif margin is not None and margin <= 0:
            dropped = RATED_LOWER if margin else RATED_ALIKE
        dropped = why_drop(better) or why_drop(worse) or dropped
    return Example(better, tools=tools, rejected=worse, margin=margin, dropped=dropped, notes=pair.notes)


def _pair(row: Row) -> _Pair | None:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = row.get("prompt") if isinstance(row.get("prompt"), str) else ""
        if prompt.startswith(_HUMAN):
            chosen, rejected = (end if end.startswith(prompt) else prompt + end for end in (chosen, rejected))
        if chosen.startswith(_HUMAN) and rejected.startswith(_HUMAN):
            return _dialogues(row, chosen, rejected)
    if _opens_with_user(chosen) and _opens_with_user(rejected):
        return _conversations(row)
    better, worse = _end(row, "chosen"), _end(row, "rejected")
    return _prompted(row, better, worse)


def _dialogues(row: Row, chosen: str, rejected: str) -> _Pair:
    """HH-RLHF: every turn but the last is the prompt, and both texts must have the same one."""
    better, worse = (_turns(row.text(text, key)) for text, key in ((chosen, "chosen"), (rejected, "rejected")))
    prompt = better[:-1]
    dropped = None
    if prompt != worse[:-1]:
        dropped = OTHER_PROMPTS
    elif misplaced(better) or misplaced(worse):
        dropped = OUT_OF_ORDER
    return _Pair(prompt, better[-1:], worse[-1:], dropped)


def _turns(text: str) -> Conversation:
    parts = _TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": role, "content": said} for role, said in zip(roles, parts[1::2], strict=True)]


def _conversations(row: Row) -> _Pair | None:
    """Two whole conversations (TRL's implicit prompt): the messages they share at the start are the prompt."""
    before = row.problems.count
    sides = []
    for key in ("chosen", "rejected"):
        turns = one_system(row, row.optional_text("system"), _list(row, row.get(key), key), row.column(key))
        if row.problems.count > before or turns is None or not in_order(row, turns, row.column(key)):
            return None
        sides.append(turns)
    better, worse = sides
    shared = 0
    while shared < min(len(better), len(worse)) and better[shared] == worse[shared]:
        shared += 1
    if better == worse:
        shared -= 1
    pair = _Pair(better[:shared], better[shared:], worse[shared:])
    if all(end and end[0]["role"] == "assistant" for end in (pair.chosen, pair.rejected)):
        return pair
    dropped = why_drop(better) or why_drop(worse) or OTHER_PROMPTS
    return _Pair(pair.prompt, pair.chosen, pair.rejected, dropped)


def _prompted(row: Row, chosen: Conversation, rejected: Conversation) -> _Pair | None:
    """Two answers to a prompt that stands apart: messages, ShareGPT turns, text, or an alpaca row's instruction."""
    system = row.optional_text("system")
    for key in ("conversations", "prompt"):
        value = row.get(key)
        if value is None:
            continue
        if is_log(value):
            turns, call = read_log(row, value, row.column(key))
            prompt, dropped, notes = settle(system, turns)
            if misplaced([*prompt, *chosen]) or misplaced([*prompt, *rejected]):
                dropped = dropped or OUT_OF_ORDER
            return _Pair(prompt, chosen, rejected, call or dropped, notes)
        ordered = one_system(row, system, spoken(row, value, row.column(key), "user"), row.column(key))
        return None if ordered is None else _Pair(ordered, chosen, rejected)
    if row.has("instruction"):
        return _Pair(alpaca_prompt(row), chosen, rejected)
    hint = "it may stand in prompt, conversations or instruction, or in chosen and rejected themselves"
    row.fault(f"no prompt, found {found(row.values)}", f"{hint}; a card can rename columns")
    return None


def _end(row: Row, key: str) -> Conversation:
    """One answer: text, a message, or the list of messages that follows the prompt."""
    value, column = row.get(key), row.column(key)
    if isinstance(value, list):
        return _list(row, value, key)
    if not isinstance(value, dict):
        return [{"role": "assistant", "content": row.text(value, column)}]
    return [read_turn(row, value, column)[0] if is_log(value) else read_message(row, value, column)]


def _list(row: Row, value: Any, key: str) -> Conversation:
    turns = read_log(row, value, row.column(key))[0] if is_log(value) else read_turns(row, value, row.column(key))
    return dialogue("", turns)


def _opens_with_user(value: Any) -> bool:
    """Whether an answer is a whole conversation, prompt included."""
    if not isinstance(value, list):
        return False
    speakers = [part.get("role", part.get("from")) for part in value if isinstance(part, dict)]
    spoken_first = next((speaker for speaker in speakers if speaker not in ("system", "developer")), None)
    return spoken_first in ("user", "human")


def _margin(row: Row) -> float | None:
    """`margin`, or the better answer's score less the worse one's; None where the row has neither."""
    if row.has("margin"):
        return row.number("margin")
    for better, worse in _SCORES:
        if row.has(better) and row.has(worse):
            high, low = row.number(better), row.number(worse)
            return None if high is None or low is None else high - low
    return None
