"""preference rows: five ways to write a pair, one result."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data.layouts import read_example
from llama_ft.data.layouts.common import (
    EMPTY_ANSWER,
    LEADING_ANSWER,
    NO_ANSWER,
    OTHER_PROMPTS,
    OUT_OF_ORDER,
    RATED_ALIKE,
    RATED_LOWER,
    SAME_ANSWERS,
)
from llama_ft.data.problems import Problems
from tests.data.layout_rows import assistant, call, good, log, refused, system, tool, user

CONTEXT = [user("a"), assistant("b"), user("c")]
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CONTEXT, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": CONTEXT, "chosen": assistant("good"), "rejected": assistant("bad")},
        {"prompt": CONTEXT, "chosen": "good", "rejected": "bad"},
        {"chosen": [*CONTEXT, assistant("good")], "rejected": [*CONTEXT, assistant("bad")]},
        {"prompt": "c", "chosen": [*CONTEXT, assistant("good")], "rejected": [*CONTEXT, assistant("bad")]},
        {
            "conversations": log("human: a", "gpt: b", "human: c"),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "chosen": log("human: a", "gpt: b", "human: c", "gpt: good"),
            "rejected": log("human: a", "gpt: b", "human: c", "gpt: bad"),
        },
        {"chosen": HH + "good", "rejected": HH + "bad"},
        {"prompt": HH, "chosen": "good", "rejected": "bad"},
        {"prompt": HH, "chosen": HH + "good", "rejected": HH + "bad"},
        {"instruction": "c", "history": [["a", "b"]], "chosen": "good", "rejected": "bad", "output": "neither"},
    ],
)
def test_every_way_to_write_a_pair_gives_the_same_pair(row: dict[str, Any]) -> None:
    example = good(row, "preference")
    shared = [user("a"), assistant("b", train=False), user("c")]
    assert example.messages == [*shared, assistant("good")]
    assert example.rejected == [*shared, assistant("bad")]
    assert example.dropped is None and example.margin is None


def test_a_prompt_as_text_and_an_input() -> None:
    example = good({"prompt": "p", "chosen": "good", "rejected": "bad", "system": "S"}, "preference")
    assert example.messages == [system("S"), user("p"), assistant("good")]
    assert example.rejected == [system("S"), user("p"), assistant("bad")]
    row = {"instruction": "i", "input": "x", "chosen": "good", "rejected": "bad"}
    assert good(row, "preference").messages == [user("i", input="x"), assistant("good")]


def test_an_end_of_several_turns_and_with_tools() -> None:
    ask, result = assistant("", tool_calls=[call("f")]), tool("x")
    row = {"prompt": [user("a")], "chosen": [ask, result, assistant("good")], "rejected": [assistant("bad")]}
    example = good({**row, "tools": [{"name": "f"}]}, "preference")
    assert example.messages == [user("a"), ask, result, assistant("good")]
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ({"margin": 0.5}, 0.5),
        ({"score_chosen": 8.5, "score_rejected": 6}, 2.5),
        ({"chosen_score": "3", "rejected_score": "2.75"}, 0.25),
        ({"chosen-rating": 5, "rejected-rating": 1}, 4.0),
        ({"chosen_rating": 5, "rejected_rating": None}, None),
        ({"score_chosen": None, "score_rejected": None}, None),
    ],
)
def test_the_margin_is_the_difference_of_the_scores(scores: dict[str, Any], margin: float | None) -> None:
    example = good({"prompt": "p", "chosen": "good", "rejected": "bad", **scores}, "preference")
    assert example.margin == margin and example.dropped is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, SAME_ANSWERS),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, SAME_ANSWERS),
        ({"prompt": "p", "chosen": "", "rejected": "bad"}, EMPTY_ANSWER),
        ({"prompt": "p", "chosen": "good", "rejected": " "}, EMPTY_ANSWER),
        ({"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 1, "score_rejected": 2}, RATED_LOWER),
        ({"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": "3", "score_rejected": 3}, RATED_ALIKE),
        ({"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 0}, RATED_ALIKE),
        ({"prompt": "p", "chosen": "same", "rejected": "same", "margin": 0}, SAME_ANSWERS),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("other"), assistant("b")]}, OTHER_PROMPTS),
        ({"chosen": [*CONTEXT, assistant("d")], "rejected": CONTEXT[:2]}, OTHER_PROMPTS),
        ({"chosen": [*CONTEXT, assistant("d")], "rejected": CONTEXT}, NO_ANSWER),
        ({"chosen": HH + "good", "rejected": HH.replace("Human: a", "Human: z") + "bad"}, OTHER_PROMPTS),
        ({"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nHuman: c"}, OUT_OF_ORDER),
        ({"chosen": HH, "rejected": HH + "bad"}, EMPTY_ANSWER),
        ({"conversations": log("human: a", "gpt: b"), "chosen": "good", "rejected": "bad"}, OUT_OF_ORDER),
    ],
)
def test_pairs_that_teach_no_difference_are_dropped(row: dict[str, Any], reason: str) -> None:
    assert good(row, "preference").dropped == reason


def test_the_logs_rules_hold_for_a_pairs_prompt() -> None:
    row = {"conversations": log("gpt: hi", "human: a"), "chosen": "good", "rejected": "bad"}
    example = good(row, "preference")
    assert example.messages == [user("a"), assistant("good")] and example.notes == (LEADING_ANSWER,)


def test_one_space_after_the_colon_is_the_format_and_more_is_text() -> None:
    example = good(
        {"chosen": "\n\nHuman:  a \n\nAssistant:b", "rejected": "\n\nHuman:  a \n\nAssistant: c"}, "preference"
    )
    assert example.messages == [user(" a "), assistant("b")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": "good", "rejected": "bad"},
            "no prompt, found an object with keys chosen, rejected — it may stand in prompt, conversations or"
            " instruction, or in chosen and rejected themselves; a card can rename columns",
        ),
        ({"prompt": "p", "chosen": 3, "rejected": "bad"}, "chosen: found a number (3), expected text"),
        (
            {"prompt": "p", "chosen": [user("x")], "rejected": [assistant("y")]},
            "chosen[0]: two user messages in a row, expected assistant",
        ),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("y")]},
            "chosen[1]: two user messages in a row, expected assistant",
        ),
        (
            {"instruction": "i", "output": "o"},
            "found an object with keys instruction, output: the alpaca layout, expected preference"
            " — write layout: alpaca, or keep one layout per file",
        ),
        (
            {"prompt": "p", "chosen": "good", "rejected": "bad", "margin": "much"},
            "margin: found text 'much', expected a number",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: \ud83d", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "chosen: found half of a surrogate pair (\\ud83d) at character 23, expected text"
            " — the text was cut inside a character; repair the row",
        ),
    ],
)
def test_malformed_pairs(row: dict[str, Any], said: str) -> None:
    assert refused(row, "preference") == [said]


def test_real_hh_rlhf_rows(real_data: Path) -> None:
    with gzip.open(real_data / "preference/hh_rlhf_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    problems = Problems()
    examples = [read_example(row, "preference", None, f"row {i}", problems) for i, row in enumerate(rows)]
    assert not problems
    reasons = Counter(example.dropped for example in examples if example is not None)
    assert reasons == {None: 2299, OTHER_PROMPTS: 5, OUT_OF_ORDER: 4, EMPTY_ANSWER: 4}
    for row, example in zip(rows, examples, strict=True):
        assert example is not None
        if example.dropped is None:
            assert row["chosen"].endswith(example.messages[-1]["content"])
            assert example.rejected is not None and example.rejected[:-1] == example.messages[:-1]
