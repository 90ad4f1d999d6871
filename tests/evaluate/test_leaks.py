"""Whether a run was trained on what it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ft import load_recipe
from llama_ft.data.overlap import OverlapIndex
from llama_ft.data.prepare import inspect_data
from llama_ft.evaluate.heldout import SUITE
from llama_ft.evaluate.leaks import find_leaks, leaks_said, training_texts
from llama_ft.evaluate.suites import Context

LONG = (
    "A farmer has seventeen llamas, of which all but nine run away over the hill by night. How many llamas are left "
    "to him in the morning, and how many bales of hay do they need for a week?"
)


@pytest.fixture
def prepared(tiny_base, tmp_path: Path):
    """16 rows, one of which is asked LONG; a quarter held out."""
    questions = [LONG, *(f"What colour is hill number {number} in the month of May?" for number in range(15))]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"Nine, {text[::-1]}"}]}
        for text in questions
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "leaky",
        "model": {"base": str(tiny_base), "dtype": "float32"},
        "adapter": {"method": "lora"},
        "data": [{"path": str(tmp_path / "rows.jsonl"), "layout": "messages"}],
        "eval_data": {"holdout": 0.25},
        "template": "chatml",
        "sequence": {"max_length": 512},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return inspect_data(load_recipe(str(tmp_path / "recipe.yaml")))


def test_a_prompt_in_a_training_row_is_found_with_its_place(prepared):
    prompts = {"same": LONG, "other": "Which river is the longest of those that flow through the north of Peru?"}
    held = set(prepared.eval["row"])
    leaks = find_leaks(prompts, prepared)
    if 0 in held:
        pytest.fail("the seed holds the row out: choose another row")
    assert leaks["prompts"] == 2 and leaks["leaked"] == 1 and leaks["ids"] == ["same"]
    assert leaks["where"] == [{"id": "same", "row": leaks["where"][0]["row"], "share": 1.0}]
    assert leaks["where"][0]["row"].endswith("rows.jsonl, row 0")
    assert leaks_said(leaks) == f"1 of 2 prompts in {16 - len(held)} training rows"


def test_rows_that_were_held_out_are_no_training_rows(prepared):
    held = sorted(prepared.eval["row"])
    rows = [int(place.rpartition(" ")[2]) for place, _ in training_texts(prepared)]
    assert len(held) == 4
    assert sorted([*rows, *held]) == list(range(16))


def test_one_row_can_hold_several_prompts():
    index = OverlapIndex()
    for name, text in (("whole", LONG), ("part", LONG[:60]), ("no", "something else that is in no row of these")):
        index.add(text, name)
    found = index.find_all(f"He asks: {LONG} Nobody knows.")
    assert [name for name, _ in found] == ["whole", "part"]
    assert index.find(f"He asks: {LONG} Nobody knows.") == found[0]
    assert index.find_all("nothing") == []


def test_prompts_without_a_word_are_not_counted_as_clean(prepared):
    """Nothing can be looked for in them."""
    leaks = find_leaks({"same": LONG, "empty": "", "signs": "?! 🦙", "thai": "ช่วยอธิบายวิธีการทำอาหาร"}, prepared)
    assert (leaks["prompts"], leaks["ids"]) == (2, ["same"])


@pytest.mark.parametrize(
    "text",
    [
        "ช่วยอธิบายวิธีการทำอาหารไทยแบบง่ายๆ ให้ฉันหน่อย",
        "कृपया मुझे बताइए कि भारत की राजधानी क्या है",
        "ما هي عاصمة فرنسا وكم عدد سكانها؟",
        "请解释一下量子力学的基本原理，并举例说明。",
        "តើរាជធានីនៃប្រទេសបារាំងគឺជាអ្វី?",
    ],
)
def test_other_scripts_are_looked_for_too(text):
    index = OverlapIndex()
    index.add(text, "here")
    assert index.find_all(f"He asks: {text} Yes.") == [("here", 1.0)]
    assert index.find_all(text[: len(text) // 3]) == []


def test_rows_that_are_gone_are_told_and_stop_nothing(prepared, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    leaks = find_leaks({"same": LONG}, prepared)
    assert "leaked" not in leaks and "rows.jsonl" in leaks["unknown"]
    assert leaks_said(leaks).startswith("not known: ")


def test_a_suite_says_what_the_run_has_seen(subjects, tiny_run, tmp_path):
    """The run's own training file, measured as if it had been held out: all of it leaks."""
    context = Context(tmp_path, tiny_run, data=[str(tiny_run.path / "train.jsonl")])
    result = SUITE.run(subjects["tuned"], context)
    assert result.leaks["leaked"] == result.leaks["prompts"] == result.leaks["rows"] == 16
    clean = SUITE.run(subjects["tuned"], Context(tmp_path / "clean", tiny_run))
    assert (clean.leaks["leaked"], clean.leaks["prompts"]) == (0, 8)
    assert SUITE.run(subjects["base"], context).leaks == result.leaks
