"""The licence of a base on its model's card: which it is, and what it asks for."""

from __future__ import annotations

import pytest
import yaml

from llama_ft.export.card import write_card
from llama_ft.export.licence import licence_of, terms_of
from llama_ft.files import write_text
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.run import Run


@pytest.mark.parametrize(
    ("hub_id", "identifier", "asked"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2", "may improve language models other than Llama 2"),
        ("codellama/CodeLlama-7b-hf", "llama2", "700 million"),
        ("meta-llama/Meta-Llama-3-8B", "llama3", "“Built with Meta Llama 3”"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "begin the model's name with “Llama”"),
        ("meta-llama/Meta-Llama-3.1-405B", "llama3.1", "llama3_1/license"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2", "acceptable use policy"),
        ("huggyllama/llama-7b", "other", "research alone"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ""),
    ],
)
def test_a_base_on_the_hub(hub_id, identifier, asked):
    licence = licence_of(hub_id)
    assert licence.identifier == identifier
    assert asked in terms_of(licence) and bool(terms_of(licence)) is bool(asked)


def test_outputs_of_llama_3_1_may_train_others():
    assert "may improve" not in terms_of(licence_of("meta-llama/Llama-3.1-8B"))


def test_an_unknown_base():
    assert licence_of("someone/model") is None and licence_of(None) is None


def card_of(name: str, folder) -> tuple[dict, str]:
    run = Run(folder)
    write_text(run.recipe_file, dump(load_recipe(name, look_up=False)))
    text = write_card(run).read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_card_says_what_the_licence_asks(tmp_path):
    front, text = card_of("llama-3/llama-3.1-8b-lora", tmp_path / "three")
    assert front["license"] == "llama3.1" and "## Licence of the base" in text and "Built with Llama" in text
    front, text = card_of("quickstart", tmp_path / "small")
    assert "## Licence of the base" not in text


def test_every_shipped_hub_base_is_known(tmp_path):
    bases = {load_recipe(name, look_up=False).model.base for name in shipped_recipes()}
    hub = {base for base in bases if "/" in base and not base.startswith(("runs/", "preset:"))}
    assert len(hub) > 6 and all(licence_of(base) for base in hub)
