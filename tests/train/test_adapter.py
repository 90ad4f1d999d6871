"""What a saved adapter says of its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ft.recipe.run import Run
from llama_ft.train.adapter import save_adapter
from tests.tiny_run import make_run


def named(run: Run) -> tuple[str, str | None]:
    said = json.loads((run.adapter / "adapter_config.json").read_text())
    return said["base_model_name_or_path"], said["revision"]


@pytest.mark.parametrize("revision", [None, "4c2f1a7"])
def test_a_base_of_the_hub_is_named_by_its_id(tiny_base, tmp_path, revision):
    """The folder that was read, a cache of this machine, is nowhere in what others get."""
    run, model, prepared = make_run(tmp_path / "run", tiny_base)
    assert named(run) == (str(tiny_base), None)  # a folder of the user's has no other name
    stated = run.recipe.model.model_copy(update={"base": "meta-llama/Llama-2-7b-hf", "revision": revision})
    run.__dict__["recipe"] = run.recipe.model_copy(update={"model": stated})
    save_adapter(model, prepared.tokenizer, run)
    assert named(run) == ("meta-llama/Llama-2-7b-hf", revision)
    for file in run.adapter.iterdir():
        assert str(Path(tiny_base)).encode() not in file.read_bytes(), file.name


def test_new_weights_in_the_shapes_of_a_hub_model_are_not_that_model(tiny_base, tmp_path):
    run, model, prepared = make_run(tmp_path / "run", tiny_base)
    stated = run.recipe.model.model_copy(update={"base": "meta-llama/Llama-2-7b-hf", "init": "random"})
    run.__dict__["recipe"] = run.recipe.model_copy(update={"model": stated})
    save_adapter(model, prepared.tokenizer, run)
    assert named(run) == (str(tiny_base), None)
