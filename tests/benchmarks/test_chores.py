"""What lies around the steps: the text that peers are given, and the table."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from benchmarks import chores
from llama_ft import load_recipe, prepare_data


def test_prompts_and_completions_are_what_we_train_on(tiny_base: Path, tmp_path: Path, monkeypatch):
    rows = [
        {"instruction": f"Name llama {n}.", "input": "On a hill." * (n % 2), "output": f"Llama {n}"} for n in range(6)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [f"model.base={tiny_base}"]
    monkeypatch.setattr(chores, "load_recipe", lambda name, overrides: load_recipe(name, [*overrides, *base]))
    chores.as_prompts(source, tmp_path / "prompts.jsonl")
    told = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [one["completion"].strip() for one in told] == [row["output"] for row in rows]
    assert all(row["instruction"] in one["prompt"] for row, one in zip(rows, told, strict=True))
    prepared = prepare_data(load_recipe(chores.RECIPE, [f"data.0.path={source}", "eval_data=null", *base]))
    for one, row in zip(told, prepared.train, strict=True):
        ids = prepared.tokenizer(one["prompt"] + one["completion"], add_special_tokens=False)["input_ids"]
        assert ids == row["input_ids"][: len(ids)] and len(row["input_ids"]) - len(ids) <= 1


def test_the_table_compares_with_ours():
    found = {
        "start-up": {"ours": [8.0, 6.0, 7.0], "trl-tuned": [14.0, 14.0, 13.0], "torchtune": "it wants a GPU"},
        "preparation": {"ours, cold": [10.0], "ours, warm": [0.5], "trl": [40.0]},
    }
    text = chores.table(found, Namespace(rounds=3, rows=52_002))
    assert "| ours | 7.0 (6.0–8.0) | 1.0× |" in text and "| trl-tuned | 14.0 (13.0–14.0) | 2.0× |" in text
    assert "| torchtune | it wants a GPU | |" in text and "52,002 rows" in text
    assert "| trl | 40.0 (40.0–40.0) | 4.0× |" in text
