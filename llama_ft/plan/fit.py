"""The largest micro-batch that fits, and the one that `micro_batch: auto` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_ft.plan.data import DataFacts
from llama_ft.plan.memory import Case, Memory, memory
from llama_ft.plan.steps import Cut, divisors, largest_pass, per_device, uneven
from llama_ft.recipe.schema import Recipe

CPU_TOKENS = 1024
"""Mean tokens of a pass beyond which a CPU gains nothing: its products are as fast as they get."""
GPU_TOKENS = 16_384
"""The same for a GPU: some 10¹⁴ FLOP a pass on 7B, hundreds of times what a launch costs."""


@dataclass(frozen=True)
class Fit:
    """`largest`: documents per pass that fit, 0 when not even one does, None where the memory is not known."""

    largest: int | None
    chosen: Cut
    needed: Memory
    """At the chosen cut."""


def cut_of(recipe: Recipe, world: int, micro_batch: int) -> Cut:
    """A cut with that micro-batch. UserError when it does not divide the global batch."""
    share = per_device(recipe, world)
    if share % micro_batch:
        raise uneven(recipe, world * micro_batch)
    return Cut(micro_batch, share // micro_batch, world)


def needs(recipe: Recipe, facts: DataFacts, case: Case, cut: Cut) -> Memory:
    """The peak of one device with that cut."""
    return memory(case, *largest_pass(recipe, facts, cut))


def largest_that_fits(recipe: Recipe, world: int, fits: Callable[[Cut], bool]) -> int:
    """The largest divisor of a device's share for which it and every smaller one fit; 0 when none does."""
    best = 0
    for n in divisors(per_device(recipe, world)):
        if not fits(cut_of(recipe, world, n)):
            break
        best = n
    return best


def choose(
    recipe: Recipe, mean_tokens: float, world: int, *, on_gpu: bool, fits: Callable[[Cut], bool] | None = None
) -> Cut:
    """The recipe's own micro-batch, or for `auto` the largest divisor within the token budget that fits.

    fits: whether a cut fits the device's memory; None where that is not known. One document is taken when nothing fits.
    """
    asked = recipe.training.micro_batch
    if isinstance(asked, int):
        return cut_of(recipe, world, asked)
    budget = GPU_TOKENS if on_gpu else CPU_TOKENS
    chosen = 1
    for n in divisors(per_device(recipe, world)):
        within = n * mean_tokens <= budget
        if n > 1 and not (within and (fits is None or fits(cut_of(recipe, world, n)))):
            break
        chosen = n
    return cut_of(recipe, world, chosen)


def fit(recipe: Recipe, facts: DataFacts, case: Case, world: int, usable: int | None, resident: Callable) -> Fit:
    """What fits `usable` bytes of a device. `resident(memory, cut)` is what a device holds in all, export included."""

    def fits(cut: Cut) -> bool:
        return usable is None or resident(needs(recipe, facts, case, cut), cut) <= usable

    mean = recipe.sequence.max_length if recipe.training.objective == "pretrain" else facts.mean_tokens
    chosen = choose(recipe, mean, world, on_gpu=case.on_gpu, fits=fits)
    largest = largest_that_fits(recipe, world, fits) if usable is not None else None
    return Fit(largest, chosen, needs(recipe, facts, case, chosen))
