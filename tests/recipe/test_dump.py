"""A dumped recipe reads back equal, from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llama_ft.recipe import Recipe, dump, load_recipe
from llama_ft.recipe.emit import scalar
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.nodes import Findings, Scalar, Source
from llama_ft.recipe.yaml_reader import parse
from tests.recipe.conftest import GOOD

STRINGS = [
    "plain words", "no", "On", "true", "null", "~", "1e-4", "1_000", "017", "1:30", "2024-01-01", ".inf", "0x1f",
    "a: b", "a #b", "#b", "- a", "[a", "{a", "&a", "*a", "!a", "%a", "@a", "`a", "'a'", '"a"', "back\\slash", "a\nb",
    "tab\tbed", " leading", "trailing ", "é", "日本語", "🦙", "a\u2028b", "a\u0085b", "a\x7fb", "\ufeffa", "a\rb", "=",
    "<<", "a,b", "?", "? a", "-", "---", "...", "😀 end", "x" * 500,
]  # fmt: skip


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipe.yaml") == recipe
    assert dump(load_recipe("recipe.yaml")) == dump(recipe)


def test_paths_are_absolute_so_the_file_means_the_same_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, run = tmp_path / "work", tmp_path / "run"
    (work / "model").mkdir(parents=True)
    run.mkdir()
    for name in ("rows.jsonl", "t.jinja"):
        (work / name).write_text("")
    (work / "card.yaml").write_text("source: {files: {train: rows.jsonl}}\n")
    (work / "launch.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\n")
    (work / "r.yaml").write_text(
        "name: x\nmodel: {base: ./model, rope_scaling: {rope_type: yarn, factor: 2, truncate: false, mscale: null}}\n"
        "data: [{path: rows.jsonl, layout: alpaca}, {use: ./card.yaml}, {use: llama-qa, path: rows.jsonl}]\n"
        "eval_data: [{use: llama-qa, split: heldout}]\ntemplate: t.jinja\nlaunch: launch.yaml\n"
        "adapter: {method: full}\ntraining: {epochs: 0.5, learning_rate: 1e-05}\n"
    )
    monkeypatch.chdir(work)
    recipe = load_recipe("r.yaml")
    (run / "recipe.yaml").write_text(dump(recipe))
    monkeypatch.chdir(run)
    again = load_recipe("recipe.yaml")
    assert again == recipe
    assert again.model.base == str(work / "model")
    assert [source.path for source in again.data] == [str(work / "rows.jsonl"), None, str(work / "rows.jsonl")]
    assert again.data[1].use == str(work / "card.yaml")
    assert again.launch == str(work / "launch.yaml")
    assert again.model.rope_scaling is not None
    assert again.model.rope_scaling.parameters() == {"rope_type": "yarn", "factor": 2.0, "truncate": False}


@pytest.mark.parametrize("text", STRINGS)
def test_any_text_round_trips_for_us_and_for_other_readers(here: Path, text: str) -> None:
    Path("r.yaml").write_text(GOOD)
    recipe = load_recipe("r.yaml")
    source = recipe.data[0].model_copy(update={"system": text})
    recipe = recipe.model_copy(update={"data": [source]})
    Path("d.yaml").write_text(dump(recipe), encoding="utf-8", newline="")
    assert load_recipe("d.yaml").data[0].system == text
    assert yaml.safe_load(dump(recipe))["data"][0]["system"] == text  # a YAML 1.1 reader


@pytest.mark.parametrize("value", [0, 3, -7, 2**70, 0.5, 2e-05, 1e-05, 1e22, 1.5e300, 5e-324, True, False, None])
def test_numbers_read_back_as_the_same_type(value: object) -> None:
    node = parse(scalar(value), Source("x", 0), Findings())  # type: ignore[arg-type]
    assert isinstance(node, Scalar)
    assert node.value == value
    assert type(node.value) is type(value) is type(yaml.safe_load(scalar(value)))  # type: ignore[arg-type]


def test_dump_is_a_page_of_yaml_that_a_person_can_read(here: Path) -> None:
    Path("r.yaml").write_text(GOOD + "reproduces: {what: A paper, source: 'http://x', deviations: [one, two]}\n")
    lines = dump(load_recipe("r.yaml")).splitlines()
    assert lines[:12] == [
        "name: x",
        "reproduces:",
        "  what: A paper",
        '  source: "http://x"',
        "  deviations: [one, two]",
        "model:",
        "  base: smollm2-135m",
        "  revision: null",
        "  tokenizer: null",
        "  dtype: bfloat16",
        "  rope_scaling: null",
        "  init: pretrained",
    ]
    assert "  - use: llama-qa" in lines
    assert "  learning_rate: 2.0e-05" in lines


def test_a_recipe_is_frozen_and_strict_from_python_too(here: Path) -> None:
    Path("r.yaml").write_text(GOOD)
    data = load_recipe("r.yaml").model_dump()
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("r.yaml").name = "y"  # type: ignore[misc]
    for wrong in ({"learning_rate": float("nan")}, {"learning_rate": "1"}, {"seed": True}):
        with pytest.raises(ValueError, match="validation error"):
            Recipe.model_validate(data | {"training": data["training"] | wrong})
