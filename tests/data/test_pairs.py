"""Pairs and judged answers as prepared sets: what a pair costs, which pairs teach nothing, other prompts' answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llama_ft.data.ends import JudgedCollator, PairCollator, end_lengths
from llama_ft.data.others import WithOther
from llama_ft.data.prepare import inspect_data, prepare_data
from llama_ft.data.render import MASKED
from llama_ft.data.shared import first_labelled, saved_by_sharing, whole_lengths
from llama_ft.recipe.schema import Recipe
from llama_ft.train.steps import with_silence
from tests.data.conftest import write_jsonl

Make = Callable[..., Recipe]
PAIRS: dict[str, Any] = {"layout": "preference", "training": {"objective": "dpo"}}


def pair(better: str, worse: str, prompt: str = "Which?", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": better, "rejected": worse, **more}


def test_a_pair_costs_its_prompt_once(tmp_path: Path, make_recipe: Make) -> None:
    rows = [pair("This one.", "No idea at all."), pair("This one.", "This is not one."), pair("Yes.", "No.", margin=2)]
    train = prepare_data(make_recipe(write_jsonl(tmp_path / "p.jsonl", rows), **PAIRS)).train.with_format("numpy")
    for row in train:
        batch = PairCollator(share=True)([row])
        assert row["length"] == batch["input_ids"].numel() < len(row["input_ids"]) + len(row["rejected_ids"])
        assert row["labelled"] == batch["targets"].numel()
    margins = PairCollator(share=True)(list(train))["margin"]
    assert margins.isnan().tolist() == [True, True, False] and margins[2] == 2
    report = prepare_data(make_recipe(tmp_path / "p.jsonl", **PAIRS)).report.sources[0]
    assert report.tokens == sum(train["length"]) and report.labelled == sum(train["labelled"])
    whole = whole_lengths(train)
    assert whole.tolist() == [[len(row["input_ids"]), len(row["rejected_ids"])] for row in train]
    assert saved_by_sharing(train) == 1 - report.tokens / whole.sum()


def test_what_fills_a_step_of_pairs_up_has_no_rows(tmp_path: Path, make_recipe: Make) -> None:
    train = prepare_data(make_recipe(write_jsonl(tmp_path / "p.jsonl", [pair("good", "bad")]), **PAIRS)).train
    rows = list(with_silence(train, 2).with_format("numpy"))
    for share in (True, False):
        lengths = end_lengths(PairCollator(share)(rows)["ends"]).tolist()
        assert sum(lengths) == train["labelled"][0] and lengths[2:] == [0] * 4


def test_pairs_that_teach_nothing_are_counted_by_reason(tmp_path: Path, make_recipe: Make) -> None:
    rows = [
        pair("good", "bad"),
        pair("same", "same"),
        pair("good", " "),
        pair("good", "bad", score_chosen=3, score_rejected=3),
        pair("good", "bad", score_chosen=3, score_rejected=4),
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
        pair("trimmed ", " trimmed"),
    ]
    template = tmp_path / "trims.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    report = prepare_data(make_recipe(path, **PAIRS, template=str(template))).report.sources[0]
    assert report.kept == 1
    assert report.dropped == {
        "chosen equals rejected": 1,
        "empty answer": 1,
        "chosen and rejected are rated alike": 1,
        "chosen is rated below rejected": 1,
        "chosen and rejected answer different prompts": 1,
        "chosen and rejected are the same tokens": 1,
    }


def test_pairs_that_differ_behind_the_cut_alone(tmp_path: Path, make_recipe: Make) -> None:
    """They would teach nothing, and count among the cut ones: too many of them stop a run."""
    rows = [pair("good", "bad"), pair("word " * 60, "word " * 59 + "end")]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    limits: dict[str, Any] = {"max_length": 48, "overlong": "truncate"}
    prepared = inspect_data(make_recipe(path, **PAIRS, sequence=limits))
    assert prepared.report.sources[0].dropped == {"chosen equals rejected within max_length": 1}
    assert prepared.train["row"][:] == [0]
    (fault,) = prepared.report.faults
    assert fault.name == "truncated" and fault.what.startswith("1 of 2 rows (50%)")
    none = inspect_data(make_recipe(write_jsonl(tmp_path / "q.jsonl", rows[1:]), **PAIRS, sequence=limits))
    assert [f.hint for f in none.report.faults if f.name == "no-documents"] == ["raise sequence.max_length"]


def test_max_length_bounds_each_prompt_with_its_answer(tmp_path: Path, make_recipe: Make) -> None:
    rows = [pair(f"word {'good ' * n}", f"word {'bad ' * (30 - n)}") for n in range(30)]
    limits: dict[str, Any] = {"max_length": 40, "overlong": "truncate", "max_truncated": 1.0}
    train = prepare_data(make_recipe(write_jsonl(tmp_path / "p.jsonl", rows), **PAIRS, sequence=limits)).train
    assert whole_lengths(train).max() == 40 < max(train["length"])


def test_real_hh_rlhf_pairs(real_data: Path, smollm2: Path, make_recipe: Make) -> None:
    """What the guards find in the published file, and what a prompt that is laid out once saves there."""
    path = real_data / "preference" / "hh_rlhf_harmless_test.jsonl.gz"
    model = {"base": str(smollm2), "tokenizer": str(smollm2)}
    prepared = prepare_data(make_recipe(path, **PAIRS, model=model, sequence={"max_length": 1024}))
    (report,) = prepared.report.sources
    assert (report.rows, report.kept) == (2312, 2299)
    assert report.dropped == {
        "chosen and rejected answer different prompts": 5,
        "roles out of order": 4,
        "empty answer": 4,
    }
    assert (report.tokens, int(whole_lengths(prepared.train).sum())) == (509_854, 804_309)
    assert saved_by_sharing(prepared.train) == pytest.approx(0.366, abs=0.001)
    some = prepared.train.with_format("numpy").select(range(0, 1000, 50))
    batch = PairCollator(share=True)(list(some))
    assert batch["input_ids"].numel() == sum(some["length"])


# --- other prompts' answers ------------------------------------------------------------------------------------------


def judged(tmp_path: Path, make_recipe: Make, **changes: Any) -> datasets.Dataset:
    rows = [
        {"prompt": f"Question {i}?", "completion": f"Answer {'and so on ' * i}{i}.", "label": bool(i % 2)}
        for i in range(5)
    ]
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    recipe = make_recipe(path, layout="rated", training={"objective": "kto"}, **changes)
    return prepare_data(recipe).train.with_format("numpy")


def test_the_next_documents_answer(tmp_path: Path, make_recipe: Make) -> None:
    documents = judged(tmp_path, make_recipe)
    rows = WithOther(documents, 512)
    assert len(rows) == 5
    for number in range(5):
        row, after = rows[number], documents[(number + 1) % 5]
        start = first_labelled(after["labels"])
        assert row["other_ids"].tolist() == after["input_ids"][start:].tolist()
        assert row["other_labels"].tolist() == after["labels"][start:].tolist()
        assert row["input_ids"].tolist() == documents[number]["input_ids"].tolist() and row["row"] == number
    several = rows.__getitems__([4, 1])
    assert [row["row"] for row in several] == [4, 1]
    assert several[0]["other_ids"].tolist() == rows[4]["other_ids"].tolist()


def test_what_fills_a_step_up_is_nobodys_other(tmp_path: Path, make_recipe: Make) -> None:
    documents = judged(tmp_path, make_recipe)
    rows = WithOther(with_silence(documents, 2).with_format("numpy"), 512)
    assert (len(rows), rows.real) == (7, 5)
    assert [rows.other_of(number) for number in range(7)] == [1, 2, 3, 4, 0, 5, 6]
    batch = JudgedCollator()([rows[4], rows[6], rows[5]])
    lengths = end_lengths(batch["ends"]), end_lengths(batch["others"]["ends"])
    assert lengths[0].tolist() == [documents[4]["labelled"], 0, 0]
    assert lengths[1].tolist() == [documents[0]["labelled"], 0, 0]


def test_a_prompt_and_the_others_answer_stay_within_the_limit(tmp_path: Path, make_recipe: Make) -> None:
    documents = judged(tmp_path, make_recipe)
    longest = max(documents["length"])
    for row in map(WithOther(documents, int(longest)).__getitem__, range(5)):
        assert first_labelled(row["labels"]) + len(row["other_ids"]) <= longest
        assert (row["other_labels"] != MASKED).any()
    # The longest answer after the longest prompt is cut where max_length ends.
    prompt = first_labelled(documents[3]["labels"])
    assert len(WithOther(documents, prompt + 3)[3]["other_ids"]) == 3


def test_one_judged_document_alone(tmp_path: Path, make_recipe: Make) -> None:
    documents = judged(tmp_path, make_recipe)
    row = WithOther(documents.select([2]), 512)[0]
    start = first_labelled(row["labels"])
    assert np.array_equal(row["other_ids"], row["input_ids"][start:])
