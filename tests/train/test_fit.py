"""`micro_batch: auto` corrects itself once: the first forward pass says that the GPU's memory ran out."""

from __future__ import annotations

import json

import pytest
import torch

from llama_ft.errors import MachineFault
from llama_ft.recipe import load_recipe
from llama_ft.recipe.run import Run
from llama_ft.train.fit import largest_half
from llama_ft.train.trainer import LlamaTrainer
from tests.train.conftest import metric, train_here


@pytest.fixture
def small(overrides):
    return [*overrides, "export.merged=false", "tracking=[]", "training.max_steps=2", "training.save_every=100"]


def out_of_memory(monkeypatch, times: int, when: int = 0):
    """Lets `times` passes fail, from pass `when` on."""
    calls = []
    compute = LlamaTrainer.compute_loss

    def failing(self, *args, **kwargs):
        calls.append(1)
        if when < len(calls) <= when + times:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(LlamaTrainer, "compute_loss", failing)


def test_half_the_micro_batch_and_the_same_curve(small, monkeypatch, capsys, tmp_path):
    whole = train_here(small)
    lock = json.loads(whole.lock_file.read_text())
    assert (lock["micro_batch"], lock["accumulation"]) == (8, 1)
    losses = metric(whole.path)
    out_of_memory(monkeypatch, times=1, when=1)  # in the second step: the first has moved the weights
    run = train_here([*small, f"output_dir={tmp_path / 'again'}"])
    lock = json.loads(run.lock_file.read_text())
    assert (lock["micro_batch"], lock["accumulation"]) == (4, 2)
    assert metric(run.path) == pytest.approx(losses, abs=1e-5)
    assert "micro-batch 8 does not fit this GPU: beginning anew with 4" in capsys.readouterr().out


def test_a_second_failure_says_how_to_go_on(small, monkeypatch):
    out_of_memory(monkeypatch, times=2)
    with pytest.raises(MachineFault, match="ran out with 4 documents a pass") as caught:
        train_here(small)
    assert "--overwrite training.micro_batch=2" in str(caught.value)


def test_what_the_recipe_states_is_not_changed(small, monkeypatch):
    out_of_memory(monkeypatch, times=1)
    with pytest.raises(MachineFault, match=r"micro_batch=4"):
        train_here([*small, "training.micro_batch=8"])


def test_nothing_is_thrown_away_once_a_checkpoint_lies_there(small, monkeypatch):
    out_of_memory(monkeypatch, times=1, when=1)
    with pytest.raises(MachineFault, match="checkpoint step-1 is whole") as caught:
        train_here([*small, "training.save_every=1"])
    assert "--resume training.micro_batch=4" in str(caught.value)


def test_half_divides_the_batch():
    recipe = load_recipe("quickstart", ["training.global_batch=12"])
    assert [largest_half(recipe, n) for n in (12, 6, 4, 3, 2, 1, None)] == [6, 3, 2, 1, 1, None, None]


def test_a_run_notes_plan_and_measure(small):
    run: Run = train_here(small)
    planned = json.loads(run.lock_file.read_text())["plan"]
    measured = json.loads((run.path / "measured.json").read_text())
    assert planned["exact"] and (planned["steps"], planned["tokens"]) == (measured["steps"], measured["tokens"])
    assert planned["seconds"] > 0 and measured["seconds"] > measured["training_seconds"] > 0
    assert measured["peak_bytes"] > 2**28 and planned["peak_bytes"] > 2**28
