"""Leakage: planted benchmark prompts are found however they are laid out; real sets show what the rule flags."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from pathlib import Path

import pytest

from llama_ft.data.overlap import OverlapIndex
from tests.data.test_copies import alpaca_words


def read(path: Path) -> list[dict]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture(scope="module")
def humaneval(real_data: Path) -> list[dict]:
    return read(real_data / "eval" / "HumanEval.jsonl.gz")


@pytest.fixture(scope="module")
def mbpp(real_data: Path) -> list[dict]:
    return read(real_data / "eval" / "mbpp.jsonl")


@pytest.fixture(scope="module")
def alpaca(real_data: Path) -> list[str]:
    rows = json.loads((real_data / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))
    return [alpaca_words(row) for row in rows]


@pytest.fixture(scope="module")
def code(real_data: Path) -> list[str]:
    rows = json.loads((real_data / "code" / "code_alpaca_2k.json").read_text(encoding="utf-8"))
    return [alpaca_words(row) for row in rows]


def index_of(texts: dict[str, str]) -> OverlapIndex:
    index = OverlapIndex()
    for name, text in texts.items():
        index.add(text, name)
    return index


@pytest.fixture(scope="module")
def prompts(humaneval: list[dict]) -> OverlapIndex:
    return index_of({row["task_id"]: row["prompt"] for row in humaneval})


CHANGES = {
    "whole": lambda prompt: prompt,
    "inside a longer row": lambda prompt: f"Complete this function.\n\n{prompt}\n    return 1\n\nIt returns one. " * 2,
    "indented anew": lambda prompt: prompt.replace("    ", "\t").replace("\n", "\n  "),
    "on one line": lambda prompt: " ".join(prompt.split()),
    "in capitals": lambda prompt: prompt.upper(),
    "without punctuation": lambda prompt: "".join(char if char.isalnum() or char in "_ \n" else " " for char in prompt),
    "without its first line": lambda prompt: prompt.lstrip().split("\n", 1)[1],
}


# The same task about other brackets: without punctuation they are one text.
TWINS = {"HumanEval/61": "HumanEval/56"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_prompt_is_found(prompts, humaneval, alpaca, change):
    missed = []
    for number, row in enumerate(humaneval):
        planted = alpaca[number] + "\n\n" + CHANGES[change](row["prompt"]) + "\n\n" + alpaca[number + 200]
        found = prompts.find(planted)
        if found is None or found[0] not in (row["task_id"], TWINS.get(row["task_id"])):
            missed.append(row["task_id"])
    # A prompt that consists of little more than its first lines is not the same without them.
    assert len(missed) <= (20 if change == "without its first line" else 0), missed


def test_shares_by_hand():
    index = index_of({"long": " ".join(f"w{i}" for i in range(40))})

    def row(*runs: tuple[int, int]) -> str:
        return " x ".join(" ".join(f"w{i}" for i in range(*run)) for run in runs)

    assert index.find(row((0, 40))) == ("long", 1.0)
    assert index.find(row((0, 20))) is None  # exactly half
    assert index.find(row((0, 21))) == ("long", 21 / 40)
    assert index.find(row((0, 8), (10, 18), (20, 28))) == ("long", 24 / 40)
    assert index.find(row((0, 7), (7, 14), (14, 21), (21, 28), (28, 35))) is None  # runs of seven are no runs
    assert index.find(row((0, 15), (5, 20))) is None  # the same words are not counted twice


def test_one_row_must_cover_it_alone():
    words = [f"w{i}" for i in range(40)]
    index = index_of({"long": " ".join(words)})
    assert index.find(" ".join(words[:20])) is None and index.find(" ".join(words[20:])) is None


def test_a_short_text_needs_more_than_its_opening_phrase():
    index = index_of({"mbpp": "Write a python function to convert a given string list to a tuple."})
    assert index.find("Write a Python function to convert a given temperature in Celsius to Fahrenheit.") is None
    assert index.find("Please write a Python function to convert a given string list to a tuple!") == ("mbpp", 1.0)
    assert index.find("Create a Python function to convert a given string list to a tuple") == ("mbpp", 12 / 13)


def test_a_text_of_fewer_than_eight_words_must_stand_in_one_piece():
    index = index_of({"swap": "Write a function to swap two numbers.", "one": "Hello?"})
    assert index.find("First, write a function to SWAP two\nnumbers; then test it") == ("swap", 1.0)
    assert index.find("Write a function to swap the two numbers.") is None
    assert index.find("He said hello.") == ("one", 1.0)
    assert index.find("Othello") is None


def test_a_held_out_heading_takes_out_headings_alone():
    index = OverlapIndex(whole=True)
    for name, text in {"heading": " = = Reception = = ", "rules": " – ", "long": " ".join(map(str, range(8)))}.items():
        index.add(text, name)
    assert index.find("= Reception =") == ("heading", 1.0)
    for row in ("Its reception was cold.", "Reception and legacy", "Rec", "", "–", "Reception reception"):
        assert index.find(row) is None, row
    assert index.find("all of 0 1 2 3 4 5 6 7 at once") == ("long", 1.0)  # long enough to be found inside others


def test_the_largest_share_is_named_and_the_first_of_equals():
    text = " ".join(f"w{i}" for i in range(40))
    index = index_of({"part": text + " " + " ".join(f"v{i}" for i in range(20)), "a": text, "b": text, "none": "…"})
    assert len(index) == 3
    assert index.find(text) == ("a", 1.0)
    assert index.find("") is None


def test_it_travels_to_workers(prompts, humaneval):
    other = pickle.loads(pickle.dumps(prompts))
    assert other.find(humaneval[3]["prompt"]) == (humaneval[3]["task_id"], 1.0)


def test_real_sets_hold_no_humaneval(prompts, alpaca, code):
    assert [row for row in [*alpaca, *code] if prompts.find(row)] == []


def test_what_the_rule_flags_in_real_sets_was_looked_at(mbpp, alpaca, code, real_data):
    """Every flagged row asks for the very task; with Tülu 3's share for short texts too, 57 rows would be flagged."""
    index = index_of({f"mbpp/{row['task_id']}": row["text"] for row in mbpp})
    rows = json.loads((real_data / "code" / "codegen-instruct.json").read_text(encoding="utf-8"))
    codegen = [alpaca_words({**row, "output": row["response"]}) for row in rows]
    found = [(number, index.find(row)) for texts in (alpaca, code, codegen) for number, row in enumerate(texts)]
    assert [(number, one[0]) for number, one in found if one] == [
        (1173, "mbpp/374"),
        (2145, "mbpp/395"),
        (3052, "mbpp/32"),
        (3648, "mbpp/537"),
        (3795, "mbpp/395"),
    ]


def test_held_out_rows_of_a_set_without_copies_are_not_found_in_the_rest(alpaca):
    index = index_of({str(i): alpaca[i] for i in range(0, 5000, 25)})
    assert [i for i, row in enumerate(alpaca) if i % 25 and index.find(row)] == []
    assert all(index.find(alpaca[i])[1] == 1.0 for i in range(0, 5000, 25))


def test_fifty_thousand_rows_take_seconds(prompts, alpaca):
    start = time.process_time()
    for row in alpaca:
        prompts.find(row)
    assert (time.process_time() - start) * 52_002 / len(alpaca) < 10
