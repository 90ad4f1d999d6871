"""How a global batch is cut: by the recipe, by a token budget, by memory."""

from __future__ import annotations

import pytest

from llama_ft.errors import UserError
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.fit import choose, fit, largest_that_fits, needs
from llama_ft.plan.steps import Cut, count_steps, plan_steps
from llama_ft.recipe import load_recipe
from tests.plan.conftest import case, facts


@pytest.mark.parametrize(
    ("global_batch", "micro", "world", "mean", "expected"),
    [(32, "auto", 1, 100, (8, 4)), (32, "auto", 4, 100, (8, 1)), (32, 2, 4, 100, (2, 4)), (6, "auto", 1, 5000, (1, 6))],
)
def test_auto_on_a_cpu_stops_at_a_thousand_tokens(global_batch, micro, world, mean, expected):
    recipe = load_recipe("quickstart", [f"training.global_batch={global_batch}", f"training.micro_batch={micro}"])
    cut = choose(recipe, mean, world, on_gpu=False)
    assert (cut.micro_batch, cut.accumulation, cut.world) == (*expected, world)


def test_a_global_batch_that_does_not_divide_is_refused():
    recipe = load_recipe("quickstart", ["training.global_batch=10"])
    with pytest.raises(UserError, match="cannot be split into 4 equal parts"):
        choose(recipe, 100, 4, on_gpu=False)
    two = load_recipe("quickstart", ["training.global_batch=10", "training.micro_batch=2"])
    with pytest.raises(UserError, match="cannot be split into 4 equal parts"):
        choose(two, 100, 2, on_gpu=True)


def test_auto_takes_what_memory_allows_and_one_document_at_least():
    recipe = load_recipe("quickstart", ["training.global_batch=64"])
    assert choose(recipe, 100, 1, on_gpu=True, fits=lambda cut: cut.micro_batch <= 17).micro_batch == 16
    assert choose(recipe, 100, 1, on_gpu=False, fits=lambda cut: False).micro_batch == 1
    assert choose(recipe, 1000, 1, on_gpu=True).micro_batch == 16  # 16,384 tokens a pass


def test_the_largest_micro_batch_grows_with_memory():
    recipe = load_recipe("quickstart", ["training.global_batch=64"])
    data = facts([100 + 37 * i % 400 for i in range(256)])
    made = case(PRESETS["llama-3.1-8b"])
    found = []
    for gib in range(10, 150, 6):
        fitted = fit(recipe, data, made, 1, gib * 2**30, lambda parts, cut: parts.total)
        found.append(fitted.largest)
        assert not fitted.largest or needs(recipe, data, made, Cut(fitted.largest, 64 // fitted.largest, 1)).total <= (
            gib * 2**30
        )
    assert found == sorted(found) and found[0] == 0 and found[-1] == 64 and len(set(found)) > 3


def test_memory_grows_with_the_micro_batch():
    recipe = load_recipe("quickstart", ["training.global_batch=64"])
    data = facts([100 + 37 * i % 400 for i in range(256)])
    sizes = [needs(recipe, data, case(PRESETS["smollm2-135m"]), Cut(n, 64 // n, 1)).total for n in (1, 2, 4, 8, 16, 32)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert largest_that_fits(recipe, 1, lambda cut: cut.micro_batch < 9) == 8


@pytest.mark.parametrize(
    ("documents", "cut", "epochs", "expected"),
    [
        (100, Cut(4, 8, 1), 1, (4, 4)),  # 25 passes of 4, 8 a step: the last step is short
        (100, Cut(4, 8, 1), 3, (12, 4)),
        (101, Cut(4, 8, 1), 1, (4, 4)),
        (129, Cut(4, 8, 1), 1, (5, 5)),
        (100, Cut(2, 4, 4), 0.5, (2, 4)),
        (3, Cut(4, 8, 1), 1, (1, 1)),
    ],
)
def test_steps_are_counted_as_the_trainer_does(documents, cut, epochs, expected):
    recipe = load_recipe("quickstart", ["training.global_batch=32", f"training.epochs={epochs}"])
    assert count_steps(recipe, documents, cut) == expected


def test_tokens_follow_the_order_of_the_epoch():
    """Every document once an epoch; a run cut short takes the first of the same order."""
    lengths = list(range(10, 60))
    whole = load_recipe("quickstart", ["training.global_batch=8", "training.epochs=2"])
    steps = plan_steps(whole, facts(lengths), Cut(8, 1, 1))
    assert (steps.total, steps.per_epoch, steps.seen.tokens) == (14, 7, 2 * sum(lengths))
    short = load_recipe("quickstart", ["training.global_batch=8", "training.max_steps=3"])
    data = facts(lengths)
    taken = [lengths[i] for i in data.mixture.order(0)[:24]]
    assert plan_steps(short, data, Cut(8, 1, 1)).seen.tokens == sum(taken)
    assert plan_steps(short, data, Cut(4, 2, 1)).longest[0] == max(sum(taken[i : i + 4]) for i in range(0, 24, 4))
