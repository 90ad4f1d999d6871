"""Documents into steps, as the trainer counts them: how many, with how many tokens, and the longest micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from llama_ft.data.balance import laid_out, with_silent
from llama_ft.data.mixture import Mixture
from llama_ft.data.pretraining import packs_of_run
from llama_ft.errors import UserError
from llama_ft.plan.data import DataFacts
from llama_ft.plan.flops import Tokens
from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut: documents per forward pass, passes per step, and devices."""

    micro_batch: int
    accumulation: int
    world: int


@dataclass(frozen=True)
class Steps:
    """A whole run. `total` and `per_epoch` are None where the number of documents is not known."""

    total: int | None
    per_epoch: int | None
    seen: Tokens | None
    """Tokens, labelled tokens and Σℓ² of all steps."""
    longest: tuple[int, int]
    """Tokens, and labelled tokens, of the largest forward pass of one device."""


def per_device(recipe: Recipe, world: int) -> int:
    """Documents that one device takes per step.

    `pretrain` counts tokens: packs of max_length. grpo and rloo count answers: prompts with all of theirs.
    """
    batch = recipe.training.global_batch
    if recipe.training.objective in POLICY:
        batch //= recipe.sampling.answers
    if recipe.training.objective == "pretrain":
        batch = max(world, batch // recipe.sequence.max_length // world * world)
    share, rest = divmod(batch, world)
    if rest:
        raise uneven(recipe, world)
    return share


def uneven(recipe: Recipe, parts: int) -> UserError:
    """The error for a global batch that does not divide."""
    answers = recipe.sampling.answers if recipe.training.objective in POLICY else 1
    of_what = f" of prompts with {answers} answers each" if answers > 1 else ""
    return UserError(
        f"global_batch {recipe.training.global_batch} cannot be split into {parts} equal parts{of_what}",
        key="training.global_batch",
        hint=f"use a multiple of {parts * answers}: processes × micro_batch must divide it",
    )


def divisors(number: int) -> list[int]:
    """The micro-batches that cut a share evenly, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def count_steps(recipe: Recipe, documents: int, cut: Cut) -> tuple[int, int]:
    """(steps of the run, steps per epoch), by the rule of transformers' Trainer.

    An epoch has ceil(documents / (micro_batch · world)) passes and ceil(passes / accumulation) steps; a run
    ceil(epochs · steps), or max_steps.
    """
    passes = -(-documents // (cut.micro_batch * cut.world))
    per_epoch = max(1, -(-passes // cut.accumulation))
    return recipe.training.max_steps or math.ceil(float(recipe.training.epochs) * per_epoch), per_epoch


def run_packs(recipe: Recipe, mixture: Mixture, lengths: np.ndarray) -> list[np.ndarray]:
    """The packs of a whole run of `pretrain`: as many as max_steps ask for, or those of its epochs."""
    training = recipe.training
    needed = training.max_steps * per_device(recipe, 1) if training.max_steps is not None else None
    epochs = float(training.epochs)
    return packs_of_run(mixture, lengths, recipe.sequence.max_length, epochs=epochs, needed=needed)


def plan_steps(recipe: Recipe, facts: DataFacts, cut: Cut) -> Steps:
    """Counts a run's steps and tokens: exactly where the documents were counted, from means elsewhere."""
    longest = largest_pass(recipe, facts, cut)
    documents = facts.documents
    batch = cut.micro_batch * cut.accumulation * cut.world
    pretrain = recipe.training.objective == "pretrain"
    if pretrain and facts.lengths is not None and facts.labelled is not None and facts.mixture is not None:
        packs = run_packs(recipe, facts.mixture, facts.lengths)
        read = np.concatenate(packs) if packs else np.empty(0, dtype=np.int64)
        sizes = facts.lengths[read].astype(np.int64)
        counted = Tokens(int(sizes.sum()), int(facts.labelled[read].sum(dtype=np.int64)), int((sizes**2).sum()))
        return Steps(-(-len(packs) // batch), None, counted, longest)
    if pretrain and documents is not None:
        documents = max(1, round(documents * facts.mean_tokens / recipe.sequence.max_length))
    if documents is None or recipe.mixture.streaming:
        total = recipe.training.max_steps
        seen = _by_mean(facts, batch * total) if total is not None else None
        return Steps(total, None, seen, longest)
    total, per_epoch = count_steps(recipe, documents, cut)
    if facts.lengths is None:
        epochs, rest = divmod(total, per_epoch)
        count = epochs * documents + min(rest * batch, documents)
        return Steps(total, per_epoch, _by_mean(facts, count), longest)
    return Steps(total, per_epoch, _counted(facts, total, per_epoch, batch), longest)


def _by_mean(facts: DataFacts, documents: int) -> Tokens:
    return Tokens(documents * facts.mean_tokens, documents * facts.mean_labelled, documents * facts.mean_squares)


def _epochs(facts: DataFacts, total: int, per_epoch: int, batch: int) -> Iterator[np.ndarray]:
    """The documents that are trained on, an array per epoch."""
    assert facts.mixture is not None
    for epoch in range(-(-total // per_epoch)):
        steps = min(per_epoch, total - epoch * per_epoch)
        yield facts.mixture.order(epoch)[: steps * batch]


def _counted(facts: DataFacts, total: int, per_epoch: int, batch: int) -> Tokens:
    assert facts.lengths is not None and facts.labelled is not None
    each = facts.squares if facts.squares is not None else facts.lengths.astype(np.int64) ** 2
    tokens = labelled = squares = 0
    for order in _epochs(facts, total, per_epoch, batch):
        tokens, squares = tokens + int(facts.lengths[order].sum(dtype=np.int64)), squares + int(each[order].sum())
        labelled += int(facts.labelled[order].sum(dtype=np.int64))
    return Tokens(tokens, labelled, squares)


def largest_pass(recipe: Recipe, facts: DataFacts, cut: Cut) -> tuple[int, int]:
    """(tokens, labelled tokens) of the largest pass of the first epoch; by estimate, one that is hardly exceeded."""
    if recipe.training.objective == "pretrain":
        tokens = cut.micro_batch * recipe.sequence.max_length
        return tokens, tokens
    if facts.lengths is None or facts.labelled is None or facts.mixture is None:
        return _likely_pass(recipe, facts, cut.micro_batch)
    batch = cut.micro_batch * cut.accumulation * cut.world
    steps = recipe.training.max_steps
    order = facts.mixture.order(0)[: batch * steps if steps else None]
    order = laid_out(order, facts.lengths, packing=recipe.sequence.packing, **asdict(cut))
    if not len(order):
        return 0, 0
    starts = np.arange(0, len(order), cut.micro_batch)
    columns = with_silent(facts.lengths), with_silent(facts.labelled, 0)
    passes = [np.add.reduceat(column[order].astype(np.int64), starts) for column in columns]
    return int(passes[0].max()), int(passes[1].max())


def _likely_pass(recipe: Recipe, facts: DataFacts, micro_batch: int) -> tuple[int, int]:
    """Mean plus three standard errors, at most the longest each: n·μ + 3·σ·√n, at least one longest document."""
    mean, longest = facts.mean_tokens, facts.longest or recipe.sequence.max_length
    deviation = facts.deviation
    if deviation is None:
        deviation = math.sqrt(max(0.0, facts.mean_squares - mean**2))
    tokens = min(micro_batch * longest, micro_batch * mean + 3 * deviation * math.sqrt(micro_batch))
    tokens = max(tokens, min(longest, micro_batch * longest))
    return round(tokens), round(tokens * facts.mean_labelled / mean) if mean else 0
