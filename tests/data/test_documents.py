"""Rows of every layout as documents: pairs, judged answers, text, parts of long ones, rows with nothing to teach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ft.data.prepare import Prepared, inspect_data, prepare_data
from llama_ft.data.pretraining import packs_of_run
from llama_ft.data.render import MASKED
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Recipe
from tests.data.conftest import chat, chats, write_jsonl

Make = Callable[..., Recipe]


def labelled(prepared: Prepared, labels: list[int]) -> str:
    return prepared.tokenizer.decode([token for token in labels if token != MASKED])


def test_a_pair_is_two_answers_to_one_question(tmp_path: Path, make_recipe: Make) -> None:
    turns = [*chat("a", "b", "Which?")["messages"]]
    rows = [
        {
            "chosen": [*turns, {"role": "assistant", "content": "This one."}],
            "rejected": [*turns, {"role": "assistant", "content": "No idea at all."}],
            "score_chosen": 8.0,
            "score_rejected": 5.5,
        }
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    recipe = make_recipe(path, layout="preference", training={"objective": "dpo"}, sequence={"packing": False})
    prepared = prepare_data(recipe)
    (row,) = prepared.train
    assert labelled(prepared, row["labels"]) == "This one.<|im_end|>"
    assert labelled(prepared, row["rejected_labels"]) == "No idea at all.<|im_end|>"
    prompt = prepared.tokenizer.decode([i for i, x in zip(row["input_ids"], row["labels"], strict=True) if x == MASKED])
    assert prompt.count("<|im_start|>assistant") == 2 and "\nb<|im_end|>" in prompt
    assert row["margin"] == 2.5


def test_a_pair_too_long_on_either_side_is_dropped(tmp_path: Path, make_recipe: Make) -> None:
    question = chat("Which?")["messages"]

    def pair(better: str, worse: str) -> dict[str, Any]:
        answers = {"chosen": better, "rejected": worse}
        return {name: [*question, {"role": "assistant", "content": text}] for name, text in answers.items()}

    path = write_jsonl(tmp_path / "p.jsonl", [pair("a", "b"), pair("a", "b " * 99), pair("a " * 99, "b")])
    settings: dict[str, Any] = {"layout": "preference", "training": {"objective": "dpo"}}
    limits = {"packing": False, "max_length": 64, "max_truncated": 1.0}
    prepared = prepare_data(make_recipe(path, **settings, sequence=limits))
    assert prepared.train["row"][:] == [0]
    assert prepared.report.sources[0].dropped == {"longer than max_length": 2}
    cut = prepare_data(make_recipe(path, **settings, sequence={**limits, "overlong": "truncate"}))
    assert [len(row["rejected_ids"]) <= 64 for row in cut.train] == [True] * 3
    assert cut.report.sources[0].truncated == 2


def test_judged_rows_keep_their_verdict(tmp_path: Path, make_recipe: Make) -> None:
    rows = [{"prompt": "Hi", "completion": text, "label": good} for text, good in (("Hello.", True), ("Go.", False))]
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    recipe = make_recipe(path, layout="rated", training={"objective": "kto"}, sequence={"packing": False})
    assert prepare_data(recipe).train["desirable"][:] == [True, False]


def test_text_is_learnt_whole_and_ends(tmp_path: Path, make_recipe: Make) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "The llama eats <|im_end|> grass."}, {"text": " "}])
    prepared = prepare_data(make_recipe(path, layout="text", training={"objective": "pretrain"}))
    (row,) = prepared.train
    assert row["labels"] == row["input_ids"]
    # The control string in the text is text; the one after it is the end token.
    end = prepared.tokenizer.eos_token_id
    assert row["input_ids"].count(end) == 1 and row["input_ids"][-1] == end
    assert prepared.tokenizer.decode(row["input_ids"]) == "The llama eats <|im_end|> grass.<|im_end|>"
    assert prepared.report.sources[0].dropped == {"empty text": 1}


def test_long_text_is_split_and_nothing_is_lost(tmp_path: Path, make_recipe: Make) -> None:
    text = " ".join(f"llama{i}" for i in range(300))
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text}, {"text": "short"}])
    limits = {"max_length": 64, "overlong": "split"}
    recipe = make_recipe(path, layout="text", training={"objective": "pretrain"}, sequence=limits)
    prepared = prepare_data(recipe)
    parts = [row for row in prepared.train if row["row"] == 0]
    assert [row["part"] for row in parts] == list(range(len(parts)))
    assert all(row["length"] <= 64 for row in prepared.train)
    ids = [token for row in parts for token in row["input_ids"]]
    assert prepared.tokenizer.decode(ids) == text + "<|im_end|>"
    counts = prepared.report.sources[0]
    assert (counts.rows, counts.kept, counts.parts) == (2, len(parts) + 1, len(parts) - 1)
    packs = packs_of_run(prepared.mixture, prepared.lengths, 64, epochs=1.0)
    assert sorted(np.concatenate(packs)) == list(range(len(prepared.train)))
    assert 0 < prepared.report.efficiency["fill of packs"] <= 1


def test_a_long_conversation_is_split_at_turns(tmp_path: Path, make_recipe: Make) -> None:
    turns = [word for i in range(20) for word in (f"What does llama {i} eat?", f"Grass {i}.")]
    rows = [chat(*turns, system="Be brief."), chat("a", "word " * 90), *chats(2)]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    limits = {"max_length": 96, "overlong": "split"}
    prepared = prepare_data(make_recipe(path, sequence=limits))
    parts = [prepared.tokenizer.decode(row["input_ids"]) for row in prepared.train if row["row"] == 0]
    assert len(parts) > 1
    assert all(part.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") for part in parts)
    answers = "".join(labelled(prepared, row["labels"]) for row in prepared.train if row["row"] == 0)
    assert answers == "".join(f"Grass {i}.<|im_end|>" for i in range(20))
    assert prepared.report.sources[0].dropped == {"one exchange longer than max_length": 1}


def test_parts_of_one_row_are_held_out_together(tmp_path: Path, make_recipe: Make) -> None:
    rows = [chat(*[f"{word} {i} {j}?" for j in range(12) for word in ("question", "answer")]) for i in range(30)]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    limits = {"max_length": 64, "overlong": "split"}
    prepared = prepare_data(make_recipe(path, sequence=limits, eval_data={"holdout": 0.2}))
    assert prepared.eval is not None
    assert max(prepared.train["part"]) > 0
    assert not set(prepared.train["row"]) & set(prepared.eval["row"])


def test_rows_that_keep_loss_off_every_answer_are_dropped_not_faulty(tmp_path: Path, make_recipe: Make) -> None:
    muted = chat("a", "b")
    muted["messages"][1]["train"] = False
    prepared = prepare_data(make_recipe(write_jsonl(tmp_path / "c.jsonl", [muted, *chats(2)])))
    assert prepared.report.sources[0].dropped == {"no labelled token": 1}


def test_too_many_cut_rows_stop_a_run(tmp_path: Path, make_recipe: Make) -> None:
    rows = [*chats(8), chat("a", "word " * 90), chat("b", "word " * 90)]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    cut: dict[str, Any] = {"max_length": 64, "overlong": "truncate"}
    prepared = prepare_data(make_recipe(path, sequence=cut), allow=["truncated"])
    assert prepared.report.allowed == ["truncated"]
    (fault,) = prepared.report.faults
    assert fault.what == "2 of 10 rows (20%) were cut at sequence.max_length 64, more than max_truncated 10%"
    assert prepare_data(make_recipe(path, sequence={**cut, "max_truncated": 0.2})).report.faults == []


def test_one_source_among_others_that_lost_its_end(tmp_path: Path, make_recipe: Make) -> None:
    """A share of one source is not hidden behind a large other one."""
    long = write_jsonl(tmp_path / "long.jsonl", [chat("a", "word " * 90), chat("b", "c")])
    short = write_jsonl(tmp_path / "short.jsonl", chats(200))
    data = [{"path": str(path), "layout": "messages"} for path in (short, long)]
    limits = {"max_length": 64, "overlong": "truncate"}
    prepared = prepare_data(make_recipe(data=data, sequence=limits), allow=["truncated"])
    assert [fault.where for fault in prepared.report.faults] == [str(long)]


def test_a_row_of_another_kind_is_told_with_its_row(tmp_path: Path, make_recipe: Make) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"messages": []}]))
    with pytest.raises(UserError, match=f"{path}, row 1"):
        prepare_data(make_recipe(path, layout="text", training={"objective": "pretrain"}))


def test_a_text_one_token_longer_than_full_parts_loses_nothing(tmp_path: Path, make_recipe: Make) -> None:
    """The end token alone in a last part would be predicted by nothing."""
    text = "a" * 31  # with the end token 32, or four parts of eight
    for more in range(8):
        path = write_jsonl(tmp_path / f"{more}.jsonl", [{"text": text + "b" * more}])
        limits = {"max_length": 8, "overlong": "split"}
        recipe = make_recipe(path, layout="text", training={"objective": "pretrain"}, sequence=limits)
        prepared = prepare_data(recipe)
        last = prepared.train[len(prepared.train) - 1]
        assert last["input_ids"][-1] == last["labels"][-1] == prepared.tokenizer.eos_token_id
        assert min(prepared.train["length"]) > 1 and prepared.report.sources[0].dropped == {}


def test_a_template_that_refuses_a_part_is_told(tmp_path: Path, make_recipe: Make) -> None:
    template = tmp_path / "long.jinja"
    template.write_text(
        "{% if messages|length < 5 %}{{ raise_exception('five messages or more') }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [word for i in range(8) for word in (f"What does llama {i} eat?", f"Grass {i}.")]
    path = write_jsonl(tmp_path / "c.jsonl", [chat(*turns)])
    limits = {"max_length": 32, "overlong": "split"}
    with pytest.raises(UserError, match="five messages or more"):
        prepare_data(make_recipe(path, template=str(template), sequence=limits))


def test_long_rows_make_small_chunks(tmp_path: Path, make_recipe: Make) -> None:
    """Memory stays flat for a folder of books as for a file of tweets."""
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "llama " * 200_000} for _ in range(12)])
    seen: list[int] = []
    recipe = make_recipe(path, layout="text", training={"objective": "pretrain"}, sequence={"max_length": 8})
    prepared = inspect_data(recipe, progress=lambda label, rows: seen.append(rows))
    assert seen == [4, 8, 12] and prepared.report.sources[0].dropped == {"longer than max_length": 12}


def test_rows_that_differ_in_what_they_teach_are_no_copies(tmp_path: Path, make_recipe: Make) -> None:
    """Borders between turns, roles and muted answers count, white space does not."""
    muted = chat("x", "a", "y", "b")
    muted["messages"][1]["train"] = False
    rows = [
        chat("x", "a", "y", "b"),
        muted,
        chat("x a", "y b"),
        chat("a", "y b", system="x"),
        chat("x", "a", "y ", " b"),
    ]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    prepared = prepare_data(make_recipe(path, mixture={"dedupe": "exact"}))
    assert prepared.train["row"][:] == [0, 1, 2, 3]


def test_verdicts_and_both_answers_of_a_pair_count(tmp_path: Path, make_recipe: Make) -> None:
    rated = [{"prompt": "p", "completion": "a", "label": good} for good in (True, False, True)]
    pairs = [{"prompt": "p", "chosen": "a", "rejected": worse} for worse in ("b", "c", "b")]
    for layout, objective, rows in (("rated", "kto", rated), ("preference", "dpo", pairs)):
        path = write_jsonl(tmp_path / f"{layout}.jsonl", rows)
        settings: dict[str, Any] = {"training": {"objective": objective}, "sequence": {"packing": False}}
        prepared = prepare_data(make_recipe(path, layout=layout, mixture={"dedupe": "exact"}, **settings))
        assert prepared.train["row"][:] == [0, 1]


def test_dedupe_leaves_a_split_text_whole(tmp_path: Path, make_recipe: Make) -> None:
    """Parts that say the same are parts of one text; a second copy of the text goes with all of its parts."""
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "llama grass " * 60}] * 2)
    limits = {"max_length": 16, "overlong": "split"}
    settings: dict[str, Any] = {"layout": "text", "training": {"objective": "pretrain"}, "sequence": limits}
    for dedupe in ("exact", "near"):
        prepared = prepare_data(make_recipe(path, **settings, mixture={"dedupe": dedupe}))
        ids = [token for row in prepared.train for token in row["input_ids"]]
        assert set(prepared.train["row"]) == {0}
        assert prepared.tokenizer.decode(ids) == "llama grass " * 60 + "<|im_end|>"


def test_a_large_group_of_copies_is_not_held_out_against_the_share(tmp_path: Path, make_recipe: Make) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", chats(1) * 50 + chats(11)[1:])
    for seed in range(4):
        recipe = make_recipe(path, eval_data={"holdout": 0.1}, training={"seed": seed})
        assert prepare_data(recipe).report.sources[0].held_out == 6


def test_an_answer_of_which_the_end_token_alone_is_labelled_is_counted(tmp_path: Path, make_recipe: Make) -> None:
    template = tmp_path / "joined.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "c.jsonl", [chat("The lla", "ma"), chat("a", " grass eats")])
    notes = prepare_data(make_recipe(path, template=str(template))).report.sources[0].notes
    assert list(notes.values()) == [1] and next(iter(notes)).startswith("only the end token labelled")


def test_a_template_that_marks_the_users_words_is_refused(tmp_path: Path, make_recipe: Make) -> None:
    template = tmp_path / "all.jinja"
    template.write_text(
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    )
    path = write_jsonl(tmp_path / "c.jsonl", chats(2))
    with pytest.raises(UserError, match="marks what the user says"):
        prepare_data(make_recipe(path, template=str(template)))
