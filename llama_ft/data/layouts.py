"""A raw row becomes a conversation, or a counted drop, or a problem with its row number.

A conversation is a list of messages `{"role", "content"}` with roles system, user, assistant: an optional system
message, then user and assistant in turn, ending with the assistant. An Alpaca row's `input` stays apart, in the user
message's `input`, since its template has two forms.

Two kinds of bad row are told apart. A *malformed* row (wrong type, missing key, another layout, roles out of order)
means the file is not what the recipe says: every one is an error. A row that merely *has nothing to learn* (no answer,
an empty turn) occurs in every real data set: it is dropped, and counted by reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from llama_ft.data.problems import Problems, found
from llama_ft.errors import UserError, nearest


class _Spoken(TypedDict):
    role: str
    content: str


class Message(_Spoken, total=False):
    """One turn. `input` is an Alpaca row's input, on a user message, never empty."""

    input: str


Conversation = list[Message]

LAYOUTS = ("alpaca", "messages")
ROLES = ("system", "user", "assistant")
COLUMNS = {"alpaca": ("instruction", "input", "output"), "messages": ("messages",)}

EMPTY_ANSWER = "empty answer"
EMPTY_TURN = "empty user turn"
NO_ANSWER = "ends on the user"

# Keys that say which layout a row of another kind has.
_SIGNS = {
    "messages": "messages",
    "conversations": "sharegpt",
    "chosen": "preference",
    "completion": "prompt-completion",
}
# Message keys that change what is trained or shown; ignoring them would be a silent loss.
_TOOLS = ("tool_calls", "tool_call_id", "function_call")
_UNSUPPORTED = (*_TOOLS, "reasoning_content", "thinking", "train", "weight", "loss")


def check_layout(layout: str | None, columns: Mapping[str, str] | None, *, key: str) -> str:
    """The layout's name, if this version reads it; `columns` may rename that layout's own keys only."""
    if layout is None:
        hint = f"add layout: alpaca or layout: messages (known layouts: {', '.join(LAYOUTS)})"
        raise UserError("a file of rows needs a layout", key=f"{key}.layout", hint=hint)
    if layout not in LAYOUTS:
        what = f"the layout '{layout}' is not read yet"
        raise UserError(what, key=f"{key}.layout", hint=f"the layouts that are: {' and '.join(LAYOUTS)}")
    for name in columns or {}:
        if name not in COLUMNS[layout]:
            hint = f"keys of the {layout} layout: {', '.join(COLUMNS[layout])}"
            raise UserError(f"columns renames '{name}', which the {layout} layout does not have", key=key, hint=hint)
    return layout


def to_conversation(
    row: Any, layout: str, columns: Mapping[str, str] | None, where: str, problems: Problems
) -> tuple[Conversation | None, str | None]:
    """Converts one decoded row.

    Returns (conversation, None) for a good row, (conversation, reason) for one to drop, (None, None) when the row is
    malformed and its problems were added with `where` ("file, row N").
    """
    before = problems.count
    if not isinstance(row, dict):
        problems.add(f"found {found(row)}, expected an object with {_listing(layout, columns)}", where=where)
        return None, None
    names = {name: (columns or {}).get(name, name) for name in COLUMNS[layout]}
    read = _alpaca if layout == "alpaca" else _messages
    conversation = read(row, names, where, problems)
    if problems.count > before or conversation is None:
        return None, None
    return conversation, _reason_to_drop(conversation)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with `system` as its system message, if it has none of its own."""
    if system is None or (conversation and conversation[0]["role"] == "system"):
        return conversation
    return [{"role": "system", "content": system}, *conversation]


def _alpaca(row: dict[str, Any], names: dict[str, str], where: str, problems: Problems) -> Conversation | None:
    missing = [name for name in (names["instruction"], names["output"]) if name not in row]
    if missing:
        _missing(row, missing, "alpaca", where, problems)
        return None
    texts = {}
    for name in ("instruction", "input", "output"):
        texts[name] = _text(row.get(names[name], ""), names[name], where, problems)
    for name in ("history", "system"):
        if row.get(name):
            hint = "keep such rows as messages (layout: messages)"
            problems.add(f"{name}: an alpaca row has no {name}, it would be lost", where=where, hint=hint)
    user: Message = {"role": "user", "content": texts["instruction"]}
    if texts["input"]:
        user["input"] = texts["input"]
    return [user, {"role": "assistant", "content": texts["output"]}]


def _messages(row: dict[str, Any], names: dict[str, str], where: str, problems: Problems) -> Conversation | None:
    column = names["messages"]
    if column not in row:
        _missing(row, [column], "messages", where, problems)
        return None
    raw = row[column]
    if not isinstance(raw, list) or not raw:
        problems.add(f"{column}: found {found(raw)}, expected a list of messages", where=where)
        return None
    if row.get("tools"):
        problems.add("tools: rows with tools are not read yet", where=where)
    before = problems.count
    conversation = [_message(part, f"{column}[{i}]", where, problems) for i, part in enumerate(raw)]
    if problems.count > before:
        return None
    if conversation[0]["role"] == "system" and not conversation[0]["content"].strip():
        del conversation[0]  # an empty system prompt says nothing; many sets fill the column with ""
    _check_order(conversation, column, where, problems)
    return conversation


def _message(part: Any, place: str, where: str, problems: Problems) -> Message:
    """One message; a faulty one is noted and replaced by an empty user turn, which nobody sees."""
    message: Message = {"role": "user", "content": ""}
    if not isinstance(part, dict):
        problems.add(f"{place}: found {found(part)}, expected an object with role, content", where=where)
        return message
    for name in ("role", "content"):
        if name not in part:
            match = nearest(name, part)
            hint = f"did you mean to write '{name}' for '{match}'?" if match else None
            if {"from", "value"} <= set(part):
                hint = "from/value is the sharegpt layout, which is not read yet"
            problems.add(f"{place}: no {name}, found {found(part)}", where=where, hint=hint)
    role = part.get("role", "user")
    if not isinstance(role, str) or role not in ROLES:
        hint = "messages of tools are not read yet" if role == "tool" else f"roles: {', '.join(ROLES)}"
        problems.add(f"{place}.role: found {found(role)}, expected one of {', '.join(ROLES)}", where=where, hint=hint)
    else:
        message["role"] = role
    message["content"] = _text(part.get("content", ""), f"{place}.content", where, problems)
    if "input" in part and part["input"] not in (None, ""):
        message["input"] = _text(part["input"], f"{place}.input", where, problems)
        if role != "user":
            problems.add(f"{place}.input: only a user message can have one", where=where)
    for name in _UNSUPPORTED:
        if part.get(name) is not None:
            problems.add(f"{place}.{name}: is not read yet, it would be lost", where=where, hint=f"remove {name}")
    return message


def _check_order(conversation: Conversation, column: str, where: str, problems: Problems) -> None:
    turns = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    offset = len(conversation) - len(turns)
    if not turns:
        problems.add(f"{column}: no user message, found only a system message", where=where)
    for i, message in enumerate(turns):
        expected = ROLES[1 + i % 2]
        if message["role"] == expected:
            continue
        place = f"{column}[{i + offset}]"
        if message["role"] == "system":
            problems.add(f"{place}: a system message stands first, or not at all", where=where)
        elif i == 0:
            problems.add(f"{place}: the assistant speaks first, expected a user message", where=where)
        else:
            problems.add(f"{place}: two {message['role']} messages in a row, expected {expected}", where=where)
        return


def _reason_to_drop(conversation: Conversation) -> str | None:
    if conversation[-1]["role"] == "user":
        return NO_ANSWER
    for message in conversation:
        if not message["content"].strip() and not message.get("input", "").strip():
            return EMPTY_ANSWER if message["role"] == "assistant" else EMPTY_TURN
    return None


def _text(value: Any, place: str, where: str, problems: Problems) -> str:
    if not isinstance(value, str):
        problems.add(f"{place}: found {found(value)}, expected text", where=where)
        return ""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{place}: found half of a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}"
        problems.add(f"{what}, expected text", where=where, hint="the text was cut inside a character; repair the row")
    return value


def _missing(row: dict[str, Any], missing: list[str], layout: str, where: str, problems: Problems) -> None:
    for sign, other in _SIGNS.items():
        if sign in row and other != layout:
            problems.add(f"found {found(row)}: the {other} layout, expected {layout}", where=where, hint=_mixed(other))
            return
    if layout == "messages" and {"instruction", "output"} <= set(row):
        problems.add(f"found {found(row)}: the alpaca layout, expected messages", where=where, hint=_mixed("alpaca"))
        return
    for name in missing:
        match = nearest(name, map(str, row))
        hint = f"did you mean '{match}'? A card can rename it: columns" if match else "a card can rename columns"
        problems.add(f"no {name}, found {found(row)}", where=where, hint=hint)


def _mixed(other: str) -> str:
    return f"write layout: {other}, or keep one layout per file" if other in LAYOUTS else "keep one layout per file"


def _listing(layout: str, columns: Mapping[str, str] | None) -> str:
    return ", ".join((columns or {}).get(name, name) for name in COLUMNS[layout])
