"""The suite `passkey`: how a number is hidden, and which answers name it."""

from __future__ import annotations

import re

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.answers import Answer
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.passkey import (
    DEPTHS,
    MAX_TOKENS,
    SUITE,
    Question,
    cell_name,
    questions,
    read_key,
    whole_name,
    written,
)
from llama_ft.evaluate.pictures import picture
from llama_ft.evaluate.suites import Context


@pytest.mark.parametrize("length", [200, 1000, 4096])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_number_stands_where_it_is_said_to(length, depth):
    """With a tokenizer that cuts at every letter, and one that cuts at white space."""
    for encode, size in ((lambda text: [*text.encode()], 6 * length), (str.split, length)):
        text, ids = written(Question("q", size, depth, "48213"), encode)
        assert size - 2 * len(encode(" Somebody shuts a gate.")) - MAX_TOKENS - 8 < len(ids) <= size - MAX_TOKENS
        assert text.count("48213") == 2 and text.endswith("The hidden number is")
        filler = text.partition("\n\n")[2].rpartition("\n\n")[0]
        before, _, after = re.split(
            r"(?:The hidden number is 48213\. Remember it: )|(?: is the hidden number\.)", filler
        )
        sentences = [part.count(".") for part in (before, after)]
        assert sentences[0] == pytest.approx(depth * sum(sentences), abs=1)


def test_a_length_without_room_is_refused_with_one_that_has_it():
    encode = str.split
    with pytest.raises(UserError, match="60 tokens leave no room") as told:
        written(Question("q", 60, 0.5, "48213"), encode)
    least = int(re.search(r"(\d+) tokens or more", str(told.value))[1])
    assert len(written(Question("q", least, 0.5, "48213"), encode)[1]) <= least - MAX_TOKENS


def test_numbers_depend_on_the_seed_and_the_question_alone():
    some, more = questions(1024, 2, 0), questions(1024, 3, 0)
    assert len(some) == 2 * len(DEPTHS) and {one.id for one in some} < {one.id for one in more}
    keys = {one.id: one.key for one in more}
    assert all(keys[one.id] == one.key for one in some)
    assert all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys.values()) and len(set(keys.values())) > 10
    assert [one.key for one in questions(1024, 2, 1)] != [one.key for one in some]


@pytest.mark.parametrize(
    ("answer", "key"),
    [(" 48213. Remember", "48213"), ("48213", "48213"), (" 4821", "4821"), (" hay", None), ("", None)],
)
def test_the_first_number_of_an_answer_counts(answer, key):
    assert read_key(answer) == key


def test_hits_are_counted_by_length_and_depth(tiny_base, tmp_path, monkeypatch):
    """A subject that sees the second half of a text alone; its scores, remarks and grid."""
    subject = open_model(str(tiny_base))

    def answers(prompts, max_tokens, tick):
        texts = [subject.tokenizer.decode(ids) for ids in prompts]
        found = [re.findall(r"\d{5}", text[len(text) // 2 :]) for text in texts]
        return [[Answer(f" {keys[-1]}." if keys else " 1", [], "length")] for keys in found]

    monkeypatch.setattr(subject, "answers", answers)
    context = Context(tmp_path, lengths=[300, 500], limit=3)
    result = SUITE.run(subject, context)
    shares = {score.name: (score.value, score.rows) for score in result.scores}
    for length in (300, 500):
        assert shares[cell_name(length, 0)] == (0, 3) and shares[cell_name(length, 1)] == (1, 3)
        whole = sum(shares[cell_name(length, depth)][0] for depth in DEPTHS) / len(DEPTHS)
        assert shares[whole_name(length)] == (pytest.approx(whole), 15)
    assert result.remarks[0].startswith("found at 300 tokens ") and "of 15" in result.remarks[0]
    grid = picture([result])
    assert grid.count("<tr") == 3 and ">0/3<" in grid and ">3/3<" in grid and ">25 %<" in grid
    assert all(row["tokens"] <= 500 - MAX_TOKENS for row in result.rows)


def test_lengths_are_parts_of_what_is_read_unless_named(tiny_base, tiny_run, tmp_path):
    subject = open_model(str(tiny_base))
    with pytest.raises(UserError, match="reads 512 tokens, not 600"):
        SUITE.run(subject, Context(tmp_path, lengths=[300, 600]))
    from llama_ft.evaluate.passkey import lengths_of

    assert lengths_of(subject, Context(tmp_path)) == [64, 128, 256, 512]
    assert lengths_of(subject, Context(tmp_path, lengths=[100, 200])) == [100, 200]


def test_smollm2_finds_a_number(smollm2, tmp_path):
    """Real weights, 160 and 320 tokens, every depth."""
    subject = open_model("smollm2-135m")
    result = SUITE.run(subject, Context(tmp_path, lengths=[160, 320], limit=1))
    assert [(result.score(whole_name(length)).value, length) for length in (160, 320)] == [(1.0, 160), (1.0, 320)]
    assert len(result.rows) == 10
    for row in result.rows:
        length = int(row["id"].split(":")[0])
        assert length - 24 < row["tokens"] <= length - MAX_TOKENS and row["wanted"] in row["answer"]
