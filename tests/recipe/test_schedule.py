"""The learning rate against transformers' own schedulers, step by step."""

from __future__ import annotations

import pytest

from llama_ft.recipe import load_recipe
from llama_ft.recipe.schedule import rate, steps_of


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("warmup", [0, 3, 0.1])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("schedule=cosine", {"name": "cosine"}),
        ("schedule=linear", {"name": "linear"}),
        ("schedule=constant", {"name": "constant_with_warmup"}),
        ("schedule=cosine final_rate=0.1", {"name": "cosine_with_min_lr", "min_lr_rate": 0.1}),
        ("schedule=wsd decay=0.25", {"name": "warmup_stable_decay", "decay_type": "linear"}),
        (
            "schedule=wsd decay=4 final_rate=0.2",
            {"name": "warmup_stable_decay", "decay_type": "linear", "min_lr_ratio": 0.2},
        ),
    ],
    ids=["cosine", "linear", "constant", "cosine to 10 %", "wsd by share", "wsd by steps"],
)
def test_every_schedule_is_transformers_own(schedule, theirs, warmup, steps):
    import torch
    from transformers import get_scheduler

    overrides = [f"training.{change}" for change in schedule.split()]
    training = load_recipe("quickstart", [*overrides, f"training.warmup={warmup}"]).training
    rising = steps_of(float(training.warmup), steps)
    settings = {key: value for key, value in theirs.items() if key != "name"}
    if theirs["name"] == "warmup_stable_decay":
        settings["num_decay_steps"] = min(steps_of(float(training.decay), steps), max(0, steps - rising))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(theirs["name"], optimizer, rising, steps, scheduler_specific_kwargs=settings)
    for step in range(steps):
        # Their wsd warms up from its floor, ours from 0 like every other schedule.
        if step >= rising or "min_lr_ratio" not in settings:
            assert rate(training, step, steps) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_a_cosine_to_ten_percent_ends_there():
    training = load_recipe("quickstart", ["training.final_rate=0.1", "training.warmup=0"]).training
    assert [rate(training, step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])


def test_a_stable_rate_is_stable_until_the_decay():
    training = load_recipe("quickstart", ["training.schedule=wsd", "training.decay=10", "training.warmup=5"]).training
    rates = [rate(training, step, 50) for step in range(50)]
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert set(rates[5:41]) == {1.0}
    assert rates[41:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
