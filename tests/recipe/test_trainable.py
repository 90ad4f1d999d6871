"""A recipe that this version cannot train is validated and refused before anything starts, at the place of its key."""

from __future__ import annotations

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from llama_ft.recipe.commands import validate_recipes
from llama_ft.recipe.trainable import untrainable
from llama_ft.train.launch import launch_command


def test_validate_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    validate_recipes(["quickstart", "training.objective=pretrain"])
    assert capsys.readouterr().out == "quickstart\t-\tlora\tsmollm2-135m\tthis version cannot train pretrain yet\n"


def test_training_is_refused_with_all_reasons_at_their_places() -> None:
    with pytest.raises(UserError) as error:
        launch_command("quickstart", ["training.objective=pretrain"], [])
    assert [str(problem) for problem in error.value.problems] == [
        "override 1: training.objective: this version cannot train pretrain yet — it trains sft, reward, dpo, kto, "
        "orpo, simpo, grpo, rloo, rejection_sampling",
    ]


def test_what_can_be_trained_is_not_refused() -> None:
    assert untrainable(load_recipe("quickstart")) == []
