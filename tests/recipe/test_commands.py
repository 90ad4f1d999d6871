"""`validate`, `show`, `recipes`, `schema` through the real command line, and how long they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ft.recipe import load_recipe, resolve
from llama_ft.recipe.commands import print_catalog, print_resolved, recipe_schema
from llama_ft.recipe.extends import shipped_recipes
from tests.recipe.conftest import GOOD

ROOT = Path(__file__).resolve().parents[2]


def cli(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "llama_ft.cli", *args], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_validate_prints_a_line_for_each_valid_recipe(tmp_path: Path) -> None:
    done = cli("validate", "quickstart", "alpaca/llama-7b-full", "training.seed=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "quickstart\t-\tlora\tsmollm2-135m\nalpaca-llama-7b-full\talpaca\tfull\thuggyllama/llama-7b\n"
    )


def test_validate_reports_all_files_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD + "lr: 1\n")
    (tmp_path / "b.yaml").write_text(GOOD)
    (tmp_path / "c.yaml").write_text(GOOD + "tempalte: 1\n")
    done = cli("validate", "a.yaml", "b.yaml", "training.epochs=none", "c.yaml", "missing.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    wrong = "override 1: training.epochs: epochs is 'none', a number above 0 is needed"
    assert done.stderr == (
        "llama-ft: cannot go on (4 problems)\n"
        "  a.yaml:5:1: lr: unknown key 'lr' — did you mean 'training.learning_rate'?\n"
        f"  {wrong}\n"
        "  c.yaml:5:1: tempalte: unknown key 'tempalte' — did you mean 'template'?\n"
        f"  missing.yaml: no such recipe — valid shipped recipes: {', '.join(sorted(shipped_recipes())[:12])} …\n"
    )
    done = cli("validate", "a.yaml", "b.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "x\t-\tlora\tsmollm2-135m\n")
    done = cli("validate", "training.epochs=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "no recipe is named" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x\n")
    assert "Traceback" in cli("validate", "a.yaml", "--debug", cwd=tmp_path).stderr


def test_a_file_whose_name_looks_like_an_override(tmp_path: Path) -> None:
    (tmp_path / "lr=1e-4.yaml").write_text(GOOD)
    assert cli("validate", "lr=1e-4.yaml", cwd=tmp_path).returncode == 0


def test_show_is_a_recipe_with_the_origin_of_each_value(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.yaml").write_text(GOOD + "tracking: [wandb]\n")
    Path("r.yaml").write_text("extends: p.yaml\ntraining: {learning_rate: 2e-4}\n")
    print_resolved("r.yaml", ["training.seed=7"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "# files: r.yaml, p.yaml"
    values = {line.split("#")[0].strip(): line.split("# ")[1] for line in lines[1:] if "#" in line}
    assert values["name: x"] == "p.yaml:1:7"
    assert values["learning_rate: 0.0002"] == "r.yaml:2:27"
    assert values["seed: 7"] == "override 1"
    assert values["epochs: 3"] == "default"
    assert values["- use: llama-qa"] == "p.yaml:3:14"
    assert values["tracking: [wandb]"] == "p.yaml:5:11"
    assert len({line.index("# ") for line in lines[1:] if "# " in line}) == 1  # aligned
    assert "\x1b" not in text
    Path("shown.yaml").write_text(text)
    assert load_recipe("shown.yaml") == load_recipe("r.yaml", ["training.seed=7"])


def test_every_value_of_a_resolved_recipe_has_an_origin(here: Path) -> None:
    for name in shipped_recipes():
        resolved = resolve(name)
        for section in ("model", "adapter", "sequence", "mixture", "training", "export"):
            for key, value in getattr(resolved.recipe, section).model_dump().items():
                parts = [f".{part}" for part in value] if isinstance(value, dict) else [""]
                for origin in (resolved.origins[f"{section}.{key}{part}"] for part in parts):
                    assert origin == "default" or origin.count(":") == 2


def test_catalog(capsys: pytest.CaptureFixture[str]) -> None:
    print_catalog()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "family", "base", "method", "hardware", "reproduces"]
    found = {row.split("  ")[0]: [cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows}
    assert list(found) == list(shipped_recipes())
    assert found["quickstart"] == ["quickstart", "-", "smollm2-135m", "lora", "CPU", "-"]
    assert found["alpaca/llama-7b-full"] == [
        "alpaca/llama-7b-full",
        "alpaca",
        "huggyllama/llama-7b",
        "full",
        "4 GPUs, FSDP2",
        "Stanford Alpaca 7B",
    ]
    for name in found:
        assert load_recipe(name)  # what is listed can be typed


def test_schema_describes_every_key_for_editors() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert list(schema["properties"])[:2] == ["extends", "name"]
    assert schema["anyOf"] == [{"required": ["extends"]}, {"required": ["name", "model", "data", "template"]}]
    assert schema["additionalProperties"] is False
    training = schema["$defs"]["Training"]["properties"]
    assert training["learning_rate"] == {
        "title": "Learning Rate",
        "description": "Peak learning rate.",
        "default": 2e-05,
        "anyOf": [
            {"exclusiveMinimum": 0, "type": "integer"},
            {"exclusiveMinimum": 0, "type": "number"},
            {"type": "null"},
        ],
    }
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for name, value in section["properties"].items():
            assert value.get("description") or "$ref" in str(value), name
            assert {"type": "null"} in value["anyOf"], name


@pytest.mark.parametrize("call", ["validate_recipes(['quickstart'])", "print_catalog()", "print_schema()"])
def test_commands_import_no_torch(tmp_path: Path, call: str) -> None:
    code = (
        f"import sys, llama_ft.cli\nfrom llama_ft.recipe.commands import *\n{call}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'accelerate', 'peft', 'trl'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_catalog_survives_a_recipe_that_is_not_valid(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    Path("recipes/fam").mkdir(parents=True)
    Path("recipes/fam/bad.yaml").write_text("name: no\n")
    monkeypatch.setattr("llama_ft.recipe.extends.shipped_root", lambda: here)
    print_catalog()
    row = capsys.readouterr().out.splitlines()[1]
    assert row == "fam/bad  fam     -     -       -         not valid here (4): validate fam/bad says why"
