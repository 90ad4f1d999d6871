"""A step of DPO, from rows to gradients, beside TRL's DPOTrainer on transformers' model: same pairs, same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks import trl_dpo
from benchmarks.pairs import write_pairs
from llama_ft import load_recipe, prepare_data
from llama_ft.data.ends import PairCollator, end_lengths, per_end
from llama_ft.train.answering import LAYOUT
from llama_ft.train.base import open_base
from llama_ft.train.compared import numbered
from llama_ft.train.load import load_for_training
from llama_ft.train.objectives.objective import Ends
from llama_ft.train.objectives.pairs import DPO
from llama_ft.train.objectives.reference import without_adapter

PAIRS = 4


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    """Four pairs of several lengths in one order, of which the first two begin alike."""
    folder = tmp_path_factory.mktemp("trl")
    rows = [
        {"prompt": f"What eats llama {n // 2}?" + " Think." * n, "chosen": "Hay. " * (n + 1), "rejected": f"{n} stones"}
        for n in range(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = json.dumps([{"path": str(folder / "pairs.jsonl"), "layout": "preference"}])
    changes = [f"data={data}", "eval_data=null", f"model.base={tiny_base}", f"output_dir={folder / 'run'}"]
    return load_recipe("zephyr/smollm2-135m-dpo", changes)


@pytest.fixture(scope="module")
def loaded(recipe):
    """Our model with an adapter that has learnt something, so that the reference is another model."""
    prepared = prepare_data(recipe)
    base = open_base(recipe, Path(recipe.output_dir), prepared.tokenizer)
    model = load_for_training(base, torch.device("cpu"), "float32").model
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    return prepared, model


@pytest.fixture(scope="module")
def theirs(recipe, loaded, tmp_path_factory):
    """TRL's loss and gradients."""
    prepared, model = loaded
    folder = tmp_path_factory.mktemp("theirs")
    weights = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter.safetensors")
    spec = {
        **{"model": recipe.model.base, "tokenizer": recipe.model.base, "pairs": str(write_pairs(prepared, folder))},
        **{"adapter": str(folder / "adapter.safetensors"), "variant": "trl-tuned-fp32", "device": "cpu"},
        **{"steps": 1, "batch": PAIRS, "micro_batch": PAIRS, "learning_rate": 1e-4, "seed": 42},
        **{"beta": float(recipe.preference.beta), "r": recipe.adapter.r, "alpha": recipe.adapter.alpha},
        "out": str(folder / "out.json"),
    }
    trainer = trl_dpo.make_trainer(spec, trl_dpo.Clock())
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


@pytest.mark.parametrize("share", [True, False])
def test_dpo_from_rows_to_gradients(recipe, loaded, theirs, share):
    """Loss to 1e-5, every gradient to 1e-5 of the largest; prompts computed once or with each answer."""
    prepared, model = loaded
    batch = PairCollator(share)([numbered(prepared.train)[n] for n in prepared.mixture.order(0)])
    model.zero_grad()

    def said() -> torch.Tensor:
        layout = {name: batch[name] for name in LAYOUT if name in batch}
        return per_end(model(**layout, rows=batch["rows"], targets=batch["targets"]).log_probs, batch["ends"])

    with torch.no_grad(), without_adapter(model):
        reference = said()
    judged = DPO(recipe.preference).judge(Ends(said(), end_lengths(batch["ends"]), reference))
    loss = judged.losses.mean()
    loss.backward()
    expected, expected_gradients = theirs
    assert abs(expected - 0.6931) > 1e-3, "the adapter is no other model than the reference"
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5 * largest, msg=name)
        assert gradient.abs().max() > 0, name
