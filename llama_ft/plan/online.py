"""What drawing and scoring answers takes: models beside the one that learns, memory, seconds. No torch.

By llama_ft/llama/sampling.py: a prompt is read once and its keys and values are kept once, its answers are drawn
together, a token of all of them at a time; a decoded token costs what :mod:`llama_ft.plan.decode` says. Scoring is a
forward pass of each reward model over every prompt once and every answer (llama_ft/train/rewards/scorer.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.plan.data import DataFacts
from llama_ft.plan.decode import decode
from llama_ft.plan.flops import Tokens, forward
from llama_ft.plan.memory import Beside, Case
from llama_ft.plan.shape import known_shape
from llama_ft.plan.speed import Speed
from llama_ft.plan.steps import per_device
from llama_ft.plan.weights import FLOAT, Weights
from llama_ft.recipe.objectives import ONLINE, POLICY, reference_of
from llama_ft.recipe.schema import Adapter, Recipe
from llama_ft.recipe.schema_model import Model

AT_ONCE = 8
"""llama_ft.train.rejection.AT_ONCE: prompts whose answers are drawn together where no step says how many."""
ASKED = 64
"""llama_ft.train.online_run.ASKED: held-out prompts that are answered at an evaluation of rejection sampling."""


@dataclass(frozen=True)
class Scorer:
    """A reward model. `known`: its own sizes; where its folder is not here yet, the base's."""

    name: str
    weights: Weights
    known: bool


def scorers(recipe: Recipe, base: Weights) -> list[Scorer]:
    """The reward models of a recipe that draws answers; none for other objectives."""
    if recipe.training.objective not in ONLINE:
        return []
    return [_scorer(one.model, base) for one in recipe.rewards if one.model is not None]


def _scorer(name: str, base: Weights) -> Scorer:
    frozen = Adapter(method="full")
    for folder in (Path(name), Path(name, "merged"), Path("runs", name, "merged")):
        if (folder / "config.json").is_file():
            try:
                shape = known_shape(Model(base=str(folder.resolve()))).shape
            except UserError:
                break
            return Scorer(name, Weights(shape, frozen, reward=True), known=True)
    return Scorer(name, Weights(base.shape, frozen, reward=True), known=False)


def missing_notes(found: list[Scorer]) -> tuple[str, ...]:
    """What the plan says of reward models that are not here."""
    names = [one.name for one in found if not one.known]
    return tuple(f"the reward model {name} is not here yet: counted as large as the base" for name in names)


def drawn_at_once(recipe: Recipe, world: int) -> int:
    """Answers that one device draws together: all of a step, or where no step says it a fixed number."""
    if recipe.training.objective in POLICY:
        return per_device(recipe, world) * recipe.sampling.answers
    return AT_ONCE * recipe.sampling.answers


def prompt_tokens(facts: DataFacts) -> float:
    """Tokens of a mean prompt; `facts` are those of the rows."""
    return max(1.0, facts.mean_tokens - facts.mean_labelled)


def beside(recipe: Recipe, case: Case, facts: DataFacts, found: list[Scorer]) -> Beside:
    """Bytes beside the model that learns: a reference's copy, reward models, and while answers are drawn their keys
    and values with one row of logits each in float32 (drawn from in three copies)."""
    copy = case.weights.held(case.element) if reference_of(recipe) == "copy" else 0
    if recipe.training.objective not in ONLINE:
        return Beside(frozen=copy)
    models = sum(case.element * one.weights.total for one in found)
    shape, rows = case.weights.shape, drawn_at_once(recipe, case.engine.devices)
    prompts = rows / recipe.sampling.answers
    tokens = prompts * prompt_tokens(facts) + rows * recipe.sampling.max_new_tokens
    kept = 2 * shape.layers * shape.kv_heads * shape.dim * case.element * tokens
    drawing = int(kept + 3 * FLOAT * rows * shape.vocabulary)
    return Beside(frozen=copy + models, sampling=drawing, first=recipe.training.objective not in POLICY)


@dataclass(frozen=True)
class Drawing:
    """Who draws and scores answers, and how fast. `facts` are those of the rows."""

    recipe: Recipe
    case: Case
    speed: Speed
    facts: DataFacts
    scorers: list[Scorer]

    def of(self, prompts: float, answers: int) -> float:
        """Seconds in which one device reads so many prompts, draws `answers` to each, and has them scored."""
        case, speed = self.case, self.speed
        prompt, new = prompt_tokens(self.facts), self.recipe.sampling.max_new_tokens
        rows = prompts * answers
        if not rows:
            return 0.0
        at_once = min(rows, drawn_at_once(self.recipe, case.engine.devices))
        read = forward(case.weights, Tokens(prompts * prompt, prompts, prompts * prompt**2)) / speed.forward
        drawn = math.ceil(rows / at_once) * new * decode(case, speed, at_once)
        said = Tokens(prompts * prompt + rows * new, 0.0, prompts * prompt**2 + rows * (2 * prompt * new + new**2))
        return read + drawn + sum(forward(one.weights, said) for one in self.scorers) / speed.forward

    def whole(self, steps: int) -> float:
        """Seconds of all answers that a run learns from.

        A policy draws in every step; rejection sampling draws once for all prompts, before the first step.
        """
        world, answers = self.case.engine.devices, self.recipe.sampling.answers
        if self.recipe.training.objective in POLICY:
            return steps * self.of(per_device(self.recipe, world), answers)
        return self.of((self.facts.documents or 0) / world, answers)
