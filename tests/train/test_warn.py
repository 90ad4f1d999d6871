"""What a run is warned of: each sign where it is there, silence where it is not, and on short or noisy runs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from llama_ft import load_recipe, prepare_data
from llama_ft.recipe.run import Run
from llama_ft.train.warn import Warnings, overfits, relative_update, stays_at_its_start
from tests.tiny_run import make_run
from tests.train.conftest import metric, train_here


def curve(steps: int, start: float, end: float, noise: float, seed: int) -> list[float]:
    """Falls within the first tenth and stays there, as fine-tuning does."""
    draw = random.Random(seed)
    fall = max(1, steps // 10)
    return [end + (start - end) * max(0.0, 1 - i / fall) + draw.gauss(0, noise) for i in range(steps)]


@pytest.mark.parametrize("steps", [10, 25, 60, 300, 3000])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_it_does_not_cry_wolf(steps, noise):
    """A run that learns a fifth of its loss is called flat in none of a hundred, however short or noisy."""
    assert not any(stays_at_its_start(curve(steps, 1.5, 1.2, noise, seed)) for seed in range(100))


@pytest.mark.parametrize(("steps", "noise"), [(100, 0.02), (300, 0.05), (3000, 0.05)])
def test_a_flat_curve_is_seen(steps, noise):
    said = [stays_at_its_start(curve(steps, 1.5, 1.5, noise, seed)) for seed in range(100)]
    assert sum(map(bool, said)) >= 90
    exactly = f"the last {steps // 2} steps have a median loss of 1.5000, the first 1.5000"
    assert stays_at_its_start([1.5] * steps) == f"nothing is learnt: {exactly}"


def test_a_curve_that_cannot_be_judged_is_not():
    assert stays_at_its_start([1.5] * 24) is None, "too short"
    assert not any(stays_at_its_start(curve(60, 1.5, 1.5, 0.5, seed)) for seed in range(20)), "too noisy"


def test_held_out_losses_decide_where_the_batches_are_too_noisy():
    noisy = curve(60, 1.5, 1.5, 0.5, seed=3)
    assert "held-out loss 1.5000 at first, 1.4990 at best" in (stays_at_its_start(noisy, [1.5, 1.499]) or "")
    assert stays_at_its_start(noisy, [1.5, 1.4]) is None
    assert stays_at_its_start([1.5] * 60, [1.5, 1.4]) is None


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ([2.0, 1.5, 1.2, 1.21, 1.23, 1.3], True),
        ([2.0, 1.5, 1.2, 1.21, 1.2, 1.3], False),  # not in a row
        ([2.0, 1.5, 1.2, 1.201, 1.202, 1.203], False),  # a trifle
        ([1.2, 1.3, 1.4], False),  # too few
    ],
)
def test_overfitting(held_out, expected):
    assert bool(overfits(held_out)) is expected


def test_the_size_of_an_update(tiny_base, tmp_path):
    """Against the difference of the matrices themselves."""
    _, model, _ = make_run(tmp_path / "run", tiny_base)
    change = whole = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default")
            change, whole = change + delta.square().sum(), whole + module.get_base_layer().weight.square().sum()
    assert relative_update(model) == pytest.approx(float((change / whole).sqrt().detach()), rel=1e-4)
    assert relative_update(model) > 1e-3
    assert relative_update(torch.nn.Linear(2, 2)) is None


def test_a_warning_is_said_once_and_forgotten_with_the_step_it_came_at(tmp_path, capsys):
    run, recipe = Run(tmp_path), load_recipe("quickstart")
    for step in (None, 2, 4):
        warnings = Warnings(run, recipe, Console(), step)
        warnings.step = 3
        warnings.say("overfitting", "held-out loss rose")
        warnings.say("overfitting", "held-out loss rose further")
        assert [one["name"] for one in json.loads((tmp_path / "warnings.json").read_text())] == ["overfitting"]
    assert capsys.readouterr().out == "warning: held-out loss rose\n" * 2, "at first, and resumed from before it"


def settings(base: Path, folder: Path, *changes: str) -> list[str]:
    for name, numbers in (("rows", range(64)), ("held", range(64, 80))):
        rows = [
            {"messages": [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": "It eats hay."}]}
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, held = (json.dumps([{"path": str(folder / f"{n}.jsonl"), "layout": "messages"}]) for n in ("rows", "held"))
    return [
        f"model.base={base}",
        "model.dtype=float32",
        f"data={data}",
        f"eval_data={held}",
        "training.epochs=2",
        "training.global_batch=4",
        "training.eval_every=16",
        "export.merged=false",
        "tracking=[]",
        f"output_dir={folder / 'run'}",
        *changes,
    ]


def test_a_run_that_learns_nothing_is_told_so_once_each(tiny_base, tmp_path, capsys):
    run = train_here(settings(tiny_base, tmp_path, "training.learning_rate=1e-9"))
    said = json.loads((run.path / "warnings.json").read_text())
    assert [one["name"] for one in said] == ["flat-curve", "end-token", "endless-answers", "hardly-moved"]
    assert all(one["step"] == 32 for one in said)
    assert "training.learning_rate 1e-09 is far below what is usual" in said[0]["message"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert lines == [f"warning: {one['message']}" for one in said]


def test_a_run_that_learns_is_warned_of_nothing(tiny_base, tmp_path, capsys):
    run = train_here(settings(tiny_base, tmp_path, "training.learning_rate=1e-2"))
    assert not (run.path / "warnings.json").exists()
    assert "warning" not in capsys.readouterr().out
    probabilities = metric(run.path, "eval_end_probability")
    assert len(probabilities) == 3
    assert probabilities[0] < 0.1
    assert 0.5 < probabilities[-1] <= 1


def test_the_end_probability_is_the_models_own(tiny_base, tmp_path):
    """Measured anew by plain transformers on the untrained base."""
    changes = settings(tiny_base, tmp_path, "training.max_steps=2")
    run = train_here(changes)
    prepared = prepare_data(load_recipe("quickstart", changes))
    end = prepared.template.end_token_id(prepared.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    logs = []
    for document in prepared.eval:
        logits = model(input_ids=torch.tensor([document["input_ids"]])).logits[0].log_softmax(-1)
        logs += [logits[i - 1, end].item() for i, label in enumerate(document["labels"]) if label == end]
    assert len(logs) == 16
    expected = torch.tensor(logs).mean().exp().item()
    assert metric(run.path, "eval_end_probability")[0] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_keeps_what_was_said_and_says_it_no_more(tiny_base, tmp_path):
    changes = settings(tiny_base, tmp_path, "training.learning_rate=1e-9", "training.save_every=8")
    first = train_here(changes)
    said = json.loads((first.path / "warnings.json").read_text())
    shutil.rmtree(Run(first.path).checkpoint(32))
    train_here(changes, resume=True)
    assert json.loads((first.path / "warnings.json").read_text()) == said
