"""All 5,000 real Alpaca rows, token for token against a plain rewrite of the original's preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llama_ft.data.layouts import to_conversation
from llama_ft.data.problems import Problems
from llama_ft.data.render import MASKED, Renderer
from llama_ft.data.template import Template
from llama_ft.tokenizer.load import load_tokenizer
from tests.data.test_templates import WITH_INPUT, WITHOUT_INPUT


@pytest.fixture(scope="module")
def rows(real_data: Path) -> list[dict[str, str]]:
    return json.loads((real_data / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["smollm2", "llama2"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return load_tokenizer(request.getfixturevalue(request.param))


def conversations(rows: list[dict[str, str]]) -> list[Any]:
    problems = Problems()
    converted = [to_conversation(row, "alpaca", None, "x", problems) for row in rows]
    assert not problems
    return [conversation for conversation, reason in converted if reason is None]


def original(row: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Stanford's way: tokenise prompt + answer + eos, tokenise the prompt alone, mask as many tokens as it has."""
    prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format_map(row)
    ids = tokenizer(prompt + row["output"] + tokenizer.eos_token).input_ids
    masked = len(tokenizer(prompt).input_ids)
    return ids, [MASKED] * masked + ids[masked:]


def test_ids_and_labels_of_every_row(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(Template.load("alpaca"), tokenizer)
    answered = [row for row in rows if row["output"].strip()]
    assert len(answered) == 4998
    documents = renderer.encode([renderer.render(conversation) for conversation in conversations(rows)])
    for row, document in zip(answered, documents, strict=True):
        assert (document.ids.tolist(), document.labels.tolist()) == original(row, tokenizer)


@pytest.mark.parametrize("template", ["alpaca", "chatml"])
def test_ids_are_apply_chat_template(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    renderer = Renderer(Template.load(template), tokenizer)
    turns = conversations(rows)[:1500]
    expected = tokenizer.apply_chat_template(
        turns, chat_template=renderer.template.source, tokenize=True, return_dict=False
    )
    documents = renderer.encode([renderer.render(conversation) for conversation in turns])
    assert [document.ids.tolist() for document in documents] == expected


def test_labels_decode_to_the_answers(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> None:
    """Exactly answer and end token, but for the share of rows (about 1 in 30) whose first token straddles."""
    renderer = Renderer(Template.load("alpaca"), tokenizer)
    turns = conversations(rows)
    shortened = 0
    for conversation, document in zip(turns, renderer.encode([renderer.render(c) for c in turns]), strict=True):
        said = tokenizer.decode([int(label) for label in document.labels if label != MASKED])
        wanted = conversation[-1]["content"] + tokenizer.eos_token
        if said == wanted:
            continue
        first = int((document.labels != MASKED).argmax()) - 1
        start = document.text.index("### Response:") + len("### Response:")
        a, b = document.offsets[first]
        assert a < start < b, "words are missing that no straddling token explains"
        assert said.strip() == document.text[b:].strip()
        shortened += 1
    assert 0 < shortened < len(turns) / 25
