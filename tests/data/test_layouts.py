"""Rows to conversations: what is kept, what is dropped and counted, what is an error with its row."""

from __future__ import annotations

from typing import Any

import pytest

from llama_ft.data.layouts import EMPTY_ANSWER, EMPTY_TURN, NO_ANSWER, check_layout, to_conversation, with_system
from llama_ft.data.problems import Problems
from llama_ft.errors import UserError


def convert(row: Any, layout: str, columns: dict[str, str] | None = None) -> tuple[Any, str | None, list[str]]:
    problems = Problems()
    conversation, reason = to_conversation(row, layout, columns, "f, row 7", problems)
    try:
        problems.raise_if_any()
    except UserError as error:
        return conversation, reason, [str(problem) for problem in error.problems]
    return conversation, reason, []


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def test_alpaca_with_and_without_input() -> None:
    row = {"instruction": "Add", "input": " 1, 2", "output": "3 ", "text": "other columns are left alone"}
    assert convert(row, "alpaca") == ([user("Add", input=" 1, 2"), assistant("3 ")], None, [])
    for row in ({"instruction": "Hi", "input": "", "output": "x"}, {"instruction": "Hi", "output": "x"}):
        assert convert(row, "alpaca") == ([user("Hi"), assistant("x")], None, [])


def test_alpaca_with_renamed_columns() -> None:
    row = {"instruction": "Add", "context": "1, 2", "response": "3"}
    columns = {"input": "context", "output": "response"}
    assert convert(row, "alpaca", columns) == ([user("Add", input="1, 2"), assistant("3")], None, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "input": "", "output": ""}, EMPTY_ANSWER),
        ({"instruction": "a", "input": "", "output": " \n"}, EMPTY_ANSWER),
        ({"instruction": "", "input": "", "output": "b"}, EMPTY_TURN),
        ({"instruction": "", "input": "x", "output": "b"}, None),
    ],
)
def test_alpaca_drops(row: dict[str, str], reason: str | None) -> None:
    conversation, dropped, said = convert(row, "alpaca")
    assert conversation is not None and dropped == reason and said == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], ["f, row 7: found a list of 1, expected an object with instruction, input, output"]),
        (None, ["f, row 7: found null, expected an object with instruction, input, output"]),
        (
            {"instruction": 3, "input": None, "output": ["x"]},
            [
                "f, row 7: instruction: found a number (3), expected text",
                "f, row 7: input: found null, expected text",
                "f, row 7: output: found a list of 1, expected text",
            ],
        ),
        (
            {"instruction": "a", "outptu": "b"},
            [
                "f, row 7: no output, found an object with keys instruction, outptu"
                " — did you mean 'outptu'? A card can rename it: columns"
            ],
        ),
        (
            {"messages": []},
            [
                "f, row 7: found an object with keys messages: the messages layout, expected alpaca"
                " — write layout: messages, or keep one layout per file"
            ],
        ),
        (
            {"conversations": []},
            [
                "f, row 7: found an object with keys conversations: the sharegpt layout, expected alpaca"
                " — keep one layout per file"
            ],
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            [
                "f, row 7: history: an alpaca row has no history, it would be lost"
                " — keep such rows as messages (layout: messages)"
            ],
        ),
        (
            {"instruction": "a\ud83d", "output": "b"},
            [
                "f, row 7: instruction: found half of a surrogate pair (\\ud83d) at character 1, expected text"
                " — the text was cut inside a character; repair the row"
            ],
        ),
    ],
)
def test_malformed_alpaca_rows(row: Any, said: list[str]) -> None:
    assert convert(row, "alpaca") == (None, None, said)


def test_messages() -> None:
    turns = [system("S"), user("a"), assistant("b"), user("c"), assistant("d")]
    assert convert({"messages": turns, "id": 4}, "messages") == (turns, None, [])
    assert convert({"turns": turns}, "messages", {"messages": "turns"}) == (turns, None, [])
    rich = [user("a", name="Ann", input=""), assistant("b", tool_calls=None)]
    assert convert({"messages": rich}, "messages") == ([user("a"), assistant("b")], None, [])
    assert convert({"messages": [system(" "), *turns[1:]]}, "messages") == (turns[1:], None, [])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("a")], NO_ANSWER),
        ([user("a"), assistant("b"), user("c")], NO_ANSWER),
        ([user("a"), assistant("")], EMPTY_ANSWER),
        ([user("a"), assistant(" "), user("c"), assistant("d")], EMPTY_ANSWER),
        ([user(""), assistant("b")], EMPTY_TURN),
    ],
)
def test_messages_drops(turns: list[Any], reason: str) -> None:
    conversation, dropped, said = convert({"messages": turns}, "messages")
    assert conversation == turns and dropped == reason and said == []


ROLES = "expected one of system, user, assistant"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, ["messages: found an empty list, expected a list of messages"]),
        ({"messages": "hi"}, ["messages: found text 'hi', expected a list of messages"]),
        ({"messages": None}, ["messages: found null, expected a list of messages"]),
        (
            {"message": []},
            ["no messages, found an object with keys message — did you mean 'message'? A card can rename it: columns"],
        ),
        (
            {"instruction": "a", "output": "b"},
            [
                "found an object with keys instruction, output: the alpaca layout, expected messages"
                " — write layout: alpaca, or keep one layout per file"
            ],
        ),
        ({"messages": [3]}, ["messages[0]: found a number (3), expected an object with role, content"]),
        (
            {"messages": [user("a"), {"role": "assistant", "text": "b"}]},
            ["messages[1]: no content, found an object with keys role, text"],
        ),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            [
                "messages[0]: no role, found an object with keys from, value"
                " — from/value is the sharegpt layout, which is not read yet",
                "messages[0]: no content, found an object with keys from, value"
                " — from/value is the sharegpt layout, which is not read yet",
            ],
        ),
        (
            {"messages": [{"role": "human", "content": "a"}, assistant("b")]},
            [f"messages[0].role: found text 'human', {ROLES} — roles: system, user, assistant"],
        ),
        (
            {"messages": [user("a"), {"role": "tool", "content": "a"}, assistant("b")]},
            [f"messages[1].role: found text 'tool', {ROLES} — messages of tools are not read yet"],
        ),
        ({"messages": [user(5), assistant("b")]}, ["messages[0].content: found a number (5), expected text"]),
        (
            {"messages": [user("a"), assistant([{"type": "text"}])]},
            ["messages[1].content: found a list of 1, expected text"],
        ),
        ({"messages": [assistant("b")]}, ["messages[0]: the assistant speaks first, expected a user message"]),
        (
            {"messages": [system("s"), assistant("b"), user("a")]},
            ["messages[1]: the assistant speaks first, expected a user message"],
        ),
        (
            {"messages": [user("a"), user("b"), assistant("c")]},
            ["messages[1]: two user messages in a row, expected assistant"],
        ),
        (
            {"messages": [user("a"), assistant("b"), assistant("c")]},
            ["messages[2]: two assistant messages in a row, expected user"],
        ),
        (
            {"messages": [user("a"), system("s"), assistant("b")]},
            ["messages[1]: a system message stands first, or not at all"],
        ),
        ({"messages": [system("s")]}, ["messages: no user message, found only a system message"]),
        (
            {"messages": [user("a"), assistant("b", train=False)]},
            ["messages[1].train: is not read yet, it would be lost — remove train"],
        ),
        (
            {"messages": [user("a"), assistant("b")], "tools": [{}]},
            ["tools: rows with tools are not read yet"],
        ),
    ],
)
def test_malformed_messages(row: Any, said: list[str]) -> None:
    assert convert(row, "messages") == (None, None, [f"f, row 7: {line}" for line in said])


def test_system_prompt_is_added_only_where_there_is_none() -> None:
    turns: Any = [user("a"), assistant("b")]
    assert with_system(turns, "S") == [system("S"), *turns]
    assert with_system([system("own"), *turns], "S") == [system("own"), *turns]
    assert with_system(turns, None) == turns


def test_layouts_that_are_not_built() -> None:
    for layout in ("sharegpt", "preference", "text", "prompt-completion"):
        with pytest.raises(UserError) as caught:
            check_layout(layout, None, key="data.0")
        assert str(caught.value) == (
            f"data.0.layout: the layout '{layout}' is not read yet — the layouts that are: alpaca and messages"
        )
    with pytest.raises(UserError, match="a file of rows needs a layout"):
        check_layout(None, None, key="data.0")
    with pytest.raises(UserError, match="columns renames 'output', which the messages layout does not have"):
        check_layout("messages", {"output": "x"}, key="data.0")
