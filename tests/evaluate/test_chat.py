"""Suite `chat`: its authors' files as they are, answers turn by turn, and a stopped call that answers the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.chat import suite
from llama_ft.evaluate.chat.questions import Question, questions, references
from llama_ft.evaluate.chat.suite import ENDED, REPEATED, Chat, said_again
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Subject
from llama_ft.evaluate.suites import Context

MORE = "Say it again, shorter."


@pytest.fixture(scope="session")
def chatting(tiny_base) -> Subject:
    return open_model(str(tiny_base), "chatml")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Five questions in FastChat's format, one of them with one turn."""
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question_id": number, "category": kind, "turns": [f"What does llama {number} eat?", MORE][:turns]}
        for number, (kind, turns) in enumerate(
            [("writing", 2), ("math", 2), ("writing", 1), ("generic", 2), ("stem", 2)], 1
        )
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def call(folder: Path, *data: Path, **how) -> Context:
    return Context(folder / "eval", data=[str(path) for path in data], max_tokens=how.pop("max_tokens", 8), **how)


# Files


def test_mt_bench_and_its_references(real_data, tmp_path):
    folder = real_data / "eval"
    context = call(tmp_path, folder / "mt_bench__question.jsonl", folder / "mt_bench__reference_answer__gpt-4.jsonl")
    found = questions(context)
    assert [one.id for one in found] == [f"mt_bench__question:{number}" for number in range(81, 161)]
    assert all(len(one.turns) == 2 for one in found)
    assert {one.category: one.temperature for one in found} == suite_temperatures()
    assert found[0].turns[1] == "Rewrite your previous response. Start every sentence with the letter A."
    known = references(context)
    assert sorted(known) == sorted(str(number) for number in range(101, 131))
    assert known["101"][0].startswith("If you have just overtaken the second person")
    assert all(len(answers) == 2 for answers in known.values())


def suite_temperatures() -> dict[str, float]:
    """FastChat's, fastchat/llm_judge/common.py."""
    hot, cold, warm = ("writing", "roleplay"), ("extraction", "math", "coding", "reasoning"), ("stem", "humanities")
    return dict.fromkeys(hot, 0.7) | dict.fromkeys(cold, 0.0) | dict.fromkeys(warm, 0.1)


def test_vicuna_and_self_instruct(real_data, tmp_path):
    folder = real_data / "eval"
    found = questions(call(tmp_path, folder / "vicuna_bench__question.jsonl"))
    assert len(found) == 80 and found[0].turns == ("How can I improve my time management skills?",)
    assert found[0].temperature == 0.7, "FastChat's for a category without one of its own"
    found = questions(call(tmp_path, folder / "user_oriented_instructions.jsonl"))
    assert len(found) == 252 and sum(not one.input for one in found) == 44
    assert found[0].asked == f"{found[0].turns[0]}\n\n{found[0].input}"
    assert found[0].conversation([]) == [{"role": "user", "content": found[0].turns[0], "input": found[0].input}]
    assert found[0].reference[0].startswith("If you have any questions about my rate or find it")


def test_alpaca_eval(tmp_path):
    rows = [
        {"instruction": f"Ask {n}", "output": "x", "generator": "text_davinci_003", "dataset": "koala"} for n in "ab"
    ]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows, indent=2))
    found = questions(call(tmp_path, path))
    assert found == [Question(f"alpaca_eval:{n}", "alpaca_eval", (f"Ask {'ab'[n]}",), category="koala") for n in (0, 1)]
    assert not Chat().needs(call(tmp_path, path))


def test_bad_rows_are_named_together(tmp_path, file):
    bad = tmp_path / "bad.jsonl"
    rows = [
        '{"question_id": 1, "turns": ["a"]}',
        '{"question_id": 1, "turns": ["b"]}',
        "{",
        '{"question_id": 3, "turns": []}',
    ]
    bad.write_text("\n".join([*rows, '{"question_id": 4, "turns": ["c", 5]}', "7"]))
    said = [str(problem) for problem in Chat().needs(call(tmp_path, file, bad))]
    assert len(said) == 5 and all(str(bad) in problem for problem in said)
    for number, what in ((2, "not JSON"), (3, "not a question"), (4, "not a question"), (5, "a JSON object is wanted")):
        assert any(f"{bad}, row {number}" in problem and what in problem for problem in said)
    assert any("two questions are called 1" in problem for problem in said)
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    [problem] = Chat().needs(call(tmp_path, empty))
    assert "needs a file of questions" in str(problem)


# Answers


def test_turns_are_answered_one_behind_the_other(chatting, file, tmp_path):
    """Greedy, against asking turn by turn alone; a second turn stands behind the first answer."""
    result = Chat().run(chatting, call(tmp_path, file, temperature=0.0))
    assert [row["id"] for row in result.rows] == [f"questions:{number}" for number in range(1, 6)]
    for row, turns in zip(result.rows, (2, 2, 1, 2, 2), strict=True):
        assert len(row["turns"]) == turns
        messages = []
        for turn in row["turns"]:
            messages.append({"role": "user", "content": turn["asked"]})
            [[alone]] = chatting.answers([chatting.renderer.prompt_ids(messages)], 8)
            assert (turn["answer"], turn["ended"], turn["tokens"]) == (alone.text, alone.ended, len(alone.tokens))
            messages.append({"role": "assistant", "content": alone.text})
        assert row["values"][ENDED] == sum(turn["ended"] == "end" for turn in row["turns"]) / turns
    assert [score.name for score in result.scores] == [ENDED, REPEATED]
    assert json.dumps(result.as_dict())


def test_a_stopped_call_answers_what_an_unbroken_one_does(chatting, file, tmp_path, monkeypatch):
    """Drawn at FastChat's temperatures, in blocks of two; what was answered is not asked again."""
    monkeypatch.setattr(suite, "AT_ONCE", 2)
    whole = Chat().run(chatting, call(tmp_path / "whole", file))

    def stop(what: str, done: int, total: int) -> None:
        if what == "questions answered" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Chat().run(chatting, call(tmp_path / "broken", file, report=stop))
    monkeypatch.setattr(suite, "AT_ONCE", 3)  # other blocks: a question is drawn by its own numbers
    seen = []
    broken = Chat().run(chatting, call(tmp_path / "broken", file, report=lambda *said: seen.append(said)))
    assert broken.rows == whole.rows
    assert seen[0] == ("questions answered", 2, 5), (
        "the block that was stopped in is asked again, the one before is not"
    )
    other = Chat().run(chatting, call(tmp_path / "other", file, seed=1))
    drawn = [row["answer"] for row in other.rows] != [row["answer"] for row in whole.rows]
    assert drawn and other.rows[1] == whole.rows[1], "math is answered greedily, whatever the seed"


def test_templates_of_one_question(tiny_base, file, tmp_path):
    """Stanford's Alpaca takes one turn, and has a place for inputs; ChatML joins them to the question."""
    alpaca = open_model(str(tiny_base), "alpaca")
    result = Chat().run(alpaca, call(tmp_path, file))
    assert [len(row["turns"]) for row in result.rows] == [1] * 5
    assert ["unasked" in row for row in result.rows] == [True, True, False, True, True]
    assert result.remarks == ["of 4 questions only the first turn was asked: its template takes one"]
    asked = tmp_path / "asked.jsonl"
    row = {
        "id": "task_0",
        "instruction": "Make it shorter.",
        "instances": [{"input": "hay and grass", "output": "hay"}],
    }
    asked.write_text(json.dumps(row))
    [one] = questions(call(tmp_path, asked))
    for template, wanted in (
        ("alpaca", "### Instruction:\nMake it shorter.\n\n### Input:\nhay and grass\n\n### Response:"),
        ("chatml", "user\nMake it shorter.\n\nhay and grass<|im_end|>"),
        ("vicuna_v1.1", "USER: Make it shorter.\n\nhay and grass ASSISTANT:"),
    ):
        subject = open_model(str(tiny_base), template)
        assert wanted in subject.tokenizer.decode(suite._prompt(subject, one, []))
    [said] = Chat().run(open_model(str(tiny_base), "chatml"), call(tmp_path, asked)).rows
    assert said["wanted"] == "hay" and said["turns"][0]["asked"] == "Make it shorter.\n\nhay and grass"


def test_a_model_without_a_template_is_not_asked(tiny_base, file, tmp_path):
    with pytest.raises(UserError, match=r"cannot be asked questions.*no chat template.*--template NAME"):
        Chat().run(open_model(str(tiny_base)), call(tmp_path, file))


def test_what_is_said_again():
    assert said_again("one two three") == 0
    assert said_again("a b c d a b c d") == pytest.approx(1 / 5), "the fifth run of four words is the first"
    assert said_again("a b c d e f g h") == 0
    assert said_again("no " * 53) == pytest.approx(49 / 50)
