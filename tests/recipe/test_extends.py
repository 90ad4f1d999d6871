"""`extends`: maps merge, lists replace, mistakes are blamed on the file that made them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.paths import shipped_root
from llama_ft.recipe import load_recipe, resolve
from tests.recipe.conftest import GOOD


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def problems(name: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    return [str(problem) for problem in caught.value.problems]


def test_three_levels_maps_merge_lists_replace(here: Path) -> None:
    write(
        {
            "base/grand.yaml": GOOD
            + "training: {epochs: 1, seed: 1, global_batch: 8}\ntracking: [wandb, mlflow]\neval_data: {holdout: 0.1}\n",
            "base/parent.yaml": "extends: grand\ntraining: {epochs: 2, seed: 2}\n",
            "child.yaml": "extends: base/parent.yaml\nname: child\ntraining: {epochs: 3}\ntracking: [trackio]\n"
            "eval_data: [{use: llama-qa, split: heldout}]\n",
        }
    )
    resolved = resolve("child.yaml")
    recipe = resolved.recipe
    assert (recipe.training.epochs, recipe.training.seed, recipe.training.global_batch) == (3, 2, 8)
    assert recipe.tracking == ["trackio"]
    assert recipe.eval_data[0].split == "heldout"  # type: ignore[index]
    assert resolved.files == [here / "child.yaml", here / "base/parent.yaml", here / "base/grand.yaml"]
    wanted = {
        "name": "child.yaml:2:7",
        "training.epochs": "child.yaml:3:20",
        "training.seed": "base/parent.yaml:2:29",
        "training.global_batch": "base/grand.yaml:5:46",
        "training.save_every": "default",
        "tracking": "child.yaml:4:11",
        "data.0.use": "base/grand.yaml:3:14",
        "data.0.weight": "default",
        "eval_data.0.split": "child.yaml:5:36",
        "adapter.r": "default",
        "reproduces": "default",
        "launch": "default",
    }
    assert {key: resolved.origins[key] for key in wanted} == wanted


def test_null_takes_a_section_or_a_key_back_to_its_default(here: Path) -> None:
    write(
        {
            "parent.yaml": GOOD
            + "training: {epochs: 9, seed: 9}\nadapter: {r: 4, alpha: 8}\neval_data: {holdout: 0.1}\ntracking: []\n",
            "child.yaml": "extends: parent.yaml\ntraining: null\nadapter: {r: null}\neval_data: ~\ntracking: null\n",
        }
    )
    resolved = resolve("child.yaml")
    recipe = resolved.recipe
    assert (recipe.training.epochs, recipe.training.seed) == (3, 42)
    assert (recipe.adapter.r, recipe.adapter.alpha) == (16, 8)
    assert recipe.eval_data is None
    assert recipe.tracking == ["tensorboard"]
    assert resolved.origins["adapter.r"] == "child.yaml:3:14"
    assert resolved.origins["training.epochs"] == "default"


def test_a_mistake_of_a_parent_is_blamed_on_the_parent(here: Path) -> None:
    write(
        {
            "parent.yaml": GOOD.replace("chatml", "chatmll") + "training:\n  epochs: zero\n  sead: 1\n",
            "child.yaml": "extends: parent.yaml\nname: 7\ntraining: {warmup: -1}\n",
        }
    )
    assert problems("child.yaml") == [
        'child.yaml:2:7: name: name is 7, which YAML reads as a number, text is needed — quote it: "7"',
        "child.yaml:3:20: training.warmup: warmup is -1, a number from 0 up is needed",
        "parent.yaml:4:11: template: no such template 'chatmll' — did you mean 'chatml'?",
        "parent.yaml:6:11: training.epochs: epochs is 'zero', a number above 0 is needed",
        "parent.yaml:7:3: training.sead: unknown key 'sead' — did you mean 'seed'?",
    ]


def test_a_mistake_that_the_child_mends_is_none(here: Path) -> None:
    write(
        {
            "parent.yaml": GOOD.replace("chatml", "nope") + "training: {epochs: zero}\n",
            "child.yaml": "extends: parent.yaml\ntemplate: chatml\ntraining: {epochs: 1}\n",
        }
    )
    assert load_recipe("child.yaml").template == "chatml"


def test_an_unreadable_parent_hides_neither_the_childs_mistakes_nor_invents_missing_keys(here: Path) -> None:
    write(
        {
            "parent.yaml": GOOD + "tracking: [\n",
            "child.yaml": "extends: parent.yaml\ntraining: {epochs: zero}\nadapter: {r: 0}\n",
        }
    )
    assert problems("child.yaml") == [
        "child.yaml:2:20: training.epochs: epochs is 'zero', a number above 0 is needed",
        "child.yaml:3:14: adapter.r: r is 0, a whole number from 1 up is needed",
        "parent.yaml:6:1: a value or a closing bracket is missing here — add it, or quote the text",
    ]


def test_cycles_show_the_chain(here: Path) -> None:
    write(
        {
            "a.yaml": "extends: b\n" + GOOD,
            "b.yaml": "name: b\nextends: c.yaml\n",
            "c.yaml": "extends: a.yaml\n",
            "outside.yaml": "extends: b.yaml\n",
            "self.yaml": "extends: ./self.yaml\n" + GOOD,
        }
    )
    hint = "write the path of another recipe, or remove extends"
    assert problems("a.yaml") == [
        "c.yaml:1:10: extends: recipes extend each other in a circle: "
        f"a.yaml:1:10 → b.yaml:2:10 → c.yaml:1:10 → a.yaml — {hint}"
    ]
    assert problems("outside.yaml") == [
        "a.yaml:1:10: extends: recipes extend each other in a circle: "
        f"b.yaml:2:10 → c.yaml:1:10 → a.yaml:1:10 → b.yaml — {hint}"
    ]
    assert problems("self.yaml") == [
        f"self.yaml:1:10: extends: recipes extend each other in a circle: self.yaml:1:10 → self.yaml — {hint}"
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[a, b]", "extends is a list, the path of one recipe is needed — write extends: ../_base/lora.yaml"),
        ("no", "extends is no, the path of one recipe is needed — write extends: ../_base/lora.yaml"),
        ("3", "extends is 3, the path of one recipe is needed — write extends: ../_base/lora.yaml"),
        ('""', "extends is '', the path of one recipe is needed — write extends: ../_base/lora.yaml"),
        ("paernt.yaml", "no such recipe 'paernt.yaml' — did you mean 'parent.yaml'?"),
        ("sub/paernt.yaml", "no such recipe 'sub/paernt.yaml' — did you mean 'sub/parent.yaml'?"),
        ("_base/lorra", "no such recipe '_base/lorra' — did you mean '_base/lora'?"),
        ("sub", "'sub' is a folder — recipes in it: parent.yaml"),
    ],
)
def test_extends_that_leads_nowhere(here: Path, value: str, message: str) -> None:
    write({"parent.yaml": GOOD, "sub/parent.yaml": GOOD, "child.yaml": f"extends: {value}\n{GOOD}"})
    assert problems("child.yaml") == [f"child.yaml:1:10: extends: {message}"]


def test_null_extends_nothing(here: Path) -> None:
    write({"r.yaml": "extends: null\n" + GOOD})
    assert load_recipe("r.yaml").name == "x"


def test_where_a_parent_is_looked_up(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the child, then in the working directory, then among the shipped recipes."""
    write(
        {
            "inner/child.yaml": "extends: p.yaml\n",
            "inner/p.yaml": GOOD.replace("name: x", "name: beside"),
            "p.yaml": GOOD.replace("name: x", "name: cwd"),
            "shipped.yaml": "extends: recipes/quickstart.yaml\nname: mine\n",
            "bare.yaml": "extends: alpaca/smollm2-135m-lora\nname: mine\n",
        }
    )
    assert load_recipe("inner/child.yaml").name == "beside"
    Path("inner/p.yaml").unlink()
    assert load_recipe("inner/child.yaml").name == "cwd"
    assert resolve("shipped.yaml").files[1] == shipped_root() / "recipes/quickstart.yaml"
    assert load_recipe("bare.yaml").reproduces is not None


def test_bare_names(here: Path) -> None:
    quickstart = shipped_root() / "recipes/quickstart.yaml"
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart", "recipes/quickstart.yaml", quickstart):
        assert resolve(name).files[0] == quickstart
    Path("alpaca").mkdir()  # a folder of that name is in nobody's way
    assert load_recipe("alpaca/smollm2-135m-lora").name == "alpaca-smollm2-135m-lora"
    Path("quickstart.yaml").write_text(GOOD)  # but a file of one's own comes first
    assert load_recipe("quickstart").name == "x"


def test_a_key_that_a_whole_chain_lacks_is_missing_from_the_recipe_itself(here: Path) -> None:
    write(
        {
            "parent.yaml": "model: {dtype: float32}\n",
            "r.yaml": "# x\nextends: parent.yaml\n" + GOOD.replace("model: {base: smollm2-135m}\n", ""),
        }
    )
    assert problems("r.yaml") == [
        "r.yaml:2:1: model.base: base is missing — add 'base: …' "
        "(Hub id, local folder (HF layout), `smollm2-135m`, or `preset:NAME` (shapes only, random weights))"
    ]
