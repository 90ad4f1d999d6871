"""`llama-ft diff`: which keys differ, from which line each value came, whatever the two sides are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.diff import differences, open_side, print_diff, values
from tests.recipe.conftest import GOOD

PARENT = GOOD + "training: {learning_rate: 1.0e-4, epochs: 2}\n"


def found(a: str, b: str) -> dict[str, tuple[object, object]]:
    lines = differences(values(open_side(a)), values(open_side(b)))
    return {line.key: (line.a and line.a.value, line.b and line.b.value) for line in lines}


@pytest.fixture
def two(here: Path) -> Path:
    Path("a.yaml").write_text(PARENT)
    Path("b.yaml").write_text("extends: a.yaml\nname: y\ntraining: {learning_rate: 2.0e-4, seed: 7}\n")
    return here


def test_values_and_their_places(two, capsys):
    assert print_diff("a.yaml", "b.yaml") is True
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["key", "a.yaml", "b.yaml"],
        ["name", "x", "a.yaml:1:7", "y", "b.yaml:2:7"],
        ["training.learning_rate", "0.0001", "a.yaml:5:27", "0.0002", "b.yaml:3:27"],
        ["training.seed", "42", "default", "7", "b.yaml:3:41"],
        ["3", "keys", "differ,", *lines[-1][3:]],
    ]


def test_columns_are_aligned(two, capsys):
    print_diff("a.yaml", "b.yaml")
    head, *rows, _ = capsys.readouterr().out.splitlines()
    place = head.index("b.yaml")
    assert [row[place:].split()[0] for row in rows] == ["y", "0.0002", "7"]


def test_a_recipe_is_equal_to_itself_and_to_its_run(two, capsys):
    run = two / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump(load_recipe("a.yaml")))
    (run / "run.lock.json").write_text("{}")
    for other in ("a.yaml", str(run), str(run / "run.lock.json")):
        assert print_diff("a.yaml", other) is False, other
        assert capsys.readouterr().out.startswith("0 keys differ, ")
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("seed: 42", "seed: 43"))
    assert found("a.yaml", str(run)) == {"training.seed": (42, 43)}


def test_json(two, capsys):
    print_diff("a.yaml", "b.yaml", as_json=True)
    assert json.loads(capsys.readouterr().out)[1] == {
        "key": "training.learning_rate",
        "a": {"value": 1e-4, "origin": "a.yaml:5:27"},
        "b": {"value": 2e-4, "origin": "b.yaml:3:27"},
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("eval_data: {holdout: 0.1}\n", {"eval_data.holdout": (None, 0.1)}),
        ("adapter: {targets: [q_proj, v_proj]}\n", {"adapter.targets": ("all-linear", ["q_proj", "v_proj"])}),
        ("sequence: {packing: false}\n", {"sequence.packing": (True, False)}),
        # 3 and 3.0 are the same number; what a method does not use differs in nothing.
        ("training: {epochs: 3.0}\n", {}),
        ("adapter: {method: full}\n", {"adapter.method": ("lora", "full")}),
    ],
)
def test_sections_lists_and_what_means_nothing(here, more, expected):
    Path("a.yaml").write_text(GOOD)
    Path("b.yaml").write_text(GOOD + more)
    assert found("a.yaml", "b.yaml") == expected


def test_a_key_that_means_nothing_on_one_side_has_no_value_there(here):
    Path("a.yaml").write_text(GOOD + "adapter: {r: 32}\n")
    Path("b.yaml").write_text(GOOD + "adapter: {method: full}\n")
    assert found("a.yaml", "b.yaml") == {"adapter.method": ("lora", "full"), "adapter.r": (32, None)}


def test_another_source_of_rows(here):
    Path("a.yaml").write_text(GOOD)
    Path("b.yaml").write_text(GOOD.replace("[{use: llama-qa}]", "[{use: llama-qa}, {use: llama-qa, limit: 3}]"))
    assert found("a.yaml", "b.yaml") == {"data.1.use": (None, "llama-qa"), "data.1.limit": (None, 3)}


def test_a_mistake_in_one_of_them_is_told(two):
    Path("b.yaml").write_text(GOOD + "trainning: {}\n")
    with pytest.raises(UserError, match="did you mean 'training'"):
        print_diff("a.yaml", "b.yaml")
    with pytest.raises(UserError, match="is not a run"):
        print_diff("a.yaml", str(two))


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--exit-code"], 1)])
def test_the_exit_status_is_gits(two, flags, status):
    line = [sys.executable, "-m", "llama_ft.cli", "diff"]
    assert subprocess.run([*line, "a.yaml", "b.yaml", *flags], capture_output=True).returncode == status
    assert subprocess.run([*line, "a.yaml", "a.yaml", *flags], capture_output=True).returncode == 0
    assert subprocess.run([*line, "a.yaml", "none.yaml", *flags], capture_output=True).returncode == 2
