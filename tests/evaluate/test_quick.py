"""The suite `quick`: its parts, its questions, and multiple choice as lm-evaluation-harness asks it."""

from __future__ import annotations

import gzip
import json
import random

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_ft.errors import UserError
from llama_ft.evaluate.heldout import HITS, NLL
from llama_ft.evaluate.material import Choice, _read_choices, choices, holds_choices, holds_documents
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.quick import ENDED, EXACT, SUITE, _choose, same, split_choices
from llama_ft.evaluate.suites import Context


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def questions(tmp_path) -> str:
    rows = [
        {"query": f"Question: What does llama {i} eat?", "choices": ["grass", "stones", "the hill"], "gold": i % 3}
        for i in range(9)
    ]
    return write_rows(tmp_path / "food.jsonl", rows)


def test_it_scores_answers_and_chooses(subjects, tiny_run, tmp_path, questions):
    context = Context(tmp_path / "eval", tiny_run, data=[questions])
    assert SUITE.needs(context) == []
    result = SUITE.run(subjects["tuned"], context)
    rows = {score.name: score.rows for score in result.scores}
    assert rows == {NLL: 8, HITS: 8, ENDED: 8, "food: multiple choice": 9}  # no held-out answer is short
    asked = [row for row in result.rows if row["id"].startswith("ask:")]
    assert asked[0]["wanted"].startswith("Llama 16 eats grass")
    assert all(row["values"][ENDED] == (row["ended"] == "end") for row in asked)
    chosen = [row for row in result.rows if "log_likelihoods" in row]
    right = [row["answer"] == row["wanted"] for row in chosen]
    assert result.score("food: multiple choice").value == pytest.approx(sum(right) / 9)
    assert result.leaks["prompts"] == 17 and result.leaks["leaked"] == 0


def test_the_answers_are_those_of_the_subject(subjects, tiny_run, tmp_path):
    subject = subjects["merged"]
    result = SUITE.run(subject, Context(tmp_path / "eval", tiny_run, limit=3))
    asked = [row for row in result.rows if row["id"].startswith("ask:")]
    assert len(asked) == 3
    prompts = [subject.renderer.prompt_ids([{"role": "user", "content": row["asked"]}]) for row in asked]
    assert [row["answer"] for row in asked] == [answer.text for [answer] in subject.answers(prompts, 128)]


def test_short_answers_are_matched(subjects, tiny_run, tmp_path):
    """The reference of one row is what the model says, of another it is not; a long one is not compared."""
    subject = subjects["merged"]
    turns = [{"role": "user", "content": "What does llama number 3 eat?"}]
    [[answer]] = subject.answers([subject.renderer.prompt_ids(turns)], 128)

    def row(said: str) -> dict:
        return {"messages": [*turns, {"role": "assistant", "content": said}]}

    said = answer.text.strip()
    rows = [row("Grass!"), row("nine words are too many to be matched here")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = SUITE.run(subject, Context(tmp_path / "eval", tiny_run, data=[path]))
    assert (result.score(EXACT).value, result.score(EXACT).rows) == (float(same(said, "Grass!")), 1)
    assert result.score(ENDED).rows == 2


@pytest.mark.parametrize(
    ("said", "wanted", "equal"),
    [
        *(("Paris.", "paris", True), (" 4 \n", "4", True), ("New  York", "new york!", True), ("5", "4", False)),
        *(
            ("5", "-5", False),
            (".5", "5", False),
            ('"-5".', "-5", True),
            ("- **Paris**", "paris", True),
            ("?!", "", True),
        ),
    ],
)
def test_answers_are_compared_without_case_and_outer_punctuation(said, wanted, equal):
    assert same(said, wanted) is equal


def test_multiple_choice_takes_the_likeliest_ending_per_letter(subjects, tiny_run):
    """Against plain transformers, one ending at a time."""
    subject = subjects["merged"]
    one = Choice("f:0", "Question: Which?", ("grass", "the hill of stones", "hay"), 1)
    model = LlamaForCausalLM.from_pretrained(tiny_run.merged, dtype=torch.float32).eval()
    said = []
    for choice in one.choices:
        before = subject.tokenizer("Question: Which?\nAnswer:")["input_ids"]
        ids = subject.tokenizer(f"Question: Which?\nAnswer: {choice}")["input_ids"]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        said.append(sum(log_probs[t - 1, ids[t]].item() for t in range(len(before), len(ids))))
    [row] = _choose(subject)([one], lambda done: None)
    assert row["log_likelihoods"] == pytest.approx(said, rel=1e-4)
    best = max(range(3), key=lambda number: said[number] / len(one.choices[number]))
    assert row["answer"] == one.choices[best]
    assert row["values"] == {"f: multiple choice": float(best == 1)}


def test_an_ending_that_melts_into_its_prompt_is_asked_alone(subjects):
    """Where one token covers the border, the prompt of that ending is another."""
    subject = subjects["base"]
    [(prompt, endings)] = split_choices(subject, "the llama", [" eats", " sleeps"])
    assert subject.tokenizer.decode([*prompt, *endings[1]]) == "the llama sleeps"
    parts = split_choices(subject, "the lla", ["ma", "x"])
    text = [subject.tokenizer.decode([*prompt, *ending]) for prompt, [ending] in parts] if len(parts) > 1 else []
    assert text == ["the llama", "the llax"]


def test_arc_easy_is_read(real_data, tmp_path):
    path = str(real_data / "eval" / "arc_easy.jsonl")
    assert holds_choices(path) and not holds_documents(path)
    found = choices(Context(tmp_path, data=[path], limit=50))
    assert len(found) == 50 and all(one.query.startswith("Question: ") for one in found)
    other = [str(real_data / "eval" / name) for name in ("HumanEval.jsonl.gz", "mbpp.jsonl")]
    assert not any(holds_choices(name) or holds_documents(name) for name in other)


def test_bad_rows_of_multiple_choice_are_all_named(tmp_path):
    good = {"query": "?", "choices": ["a", "b"], "gold": 1}
    bad = [{**good, "gold": 2}, {**good, "choices": [1, 2]}, {**good, "choices": "ab"}, {**good, "query": None}]
    path = write_rows(tmp_path / "bad.jsonl", [row for one in bad for row in (good, one)])
    with pytest.raises(UserError) as told:
        choices(Context(tmp_path, data=[path]))
    assert [one.where.rpartition(", ")[2] for one in told.value.problems] == ["row 1", "row 3", "row 5", "row 7"]


def test_a_file_of_multiple_choice_may_be_packed_or_damaged(tmp_path):
    """Line separators within a text end no row; what is no UTF-8, or ends early, is told."""
    rows = [{"query": "a\u2028b\u0085c?", "choices": ["a", "b"], "gold": 1}] * 400
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    path = str(tmp_path / "packed.jsonl.gz")
    assert holds_choices(path)
    found = choices(Context(tmp_path, data=[path]))
    assert len(found) == 400 and found[0].query == rows[0]["query"]
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes((text * 200).encode() + b'{"query": "\xff"}\n')
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(random.Random(0).randbytes(200_000).hex().encode())[:-100])
    for bad in (broken, cut):
        with pytest.raises(UserError, match="cannot be read"):
            _read(bad)


def _read(path):
    problems = []
    _read_choices(path, "x", problems)
    raise UserError(problems)


def test_a_model_by_itself_needs_something_to_be_asked(tmp_path, questions, tiny_base):
    assert "has no held-out documents" in SUITE.needs(Context(tmp_path))[0].what
    context = Context(tmp_path / "eval", data=[questions])
    assert SUITE.needs(context) == []
    result = SUITE.run(open_model(str(tiny_base)), context)
    assert [score.name for score in result.scores] == ["food: multiple choice"]
