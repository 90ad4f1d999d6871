"""What this version trains. A recipe may ask for more: it is validated and previewed, and refused at the start."""

from __future__ import annotations

from collections.abc import Mapping

from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Recipe

OBJECTIVES = ("sft", "reward", "dpo", "kto", "orpo", "simpo", "grpo", "rloo", "rejection_sampling")
METHODS = ("full", "lora", "qlora")


def untrainable(recipe: Recipe, origins: Mapping[str, str] | None = None) -> list[Problem]:
    """What the recipe asks for and this version cannot train; `origins` says where each key was written."""
    asked = (
        ("training.objective", recipe.training.objective, OBJECTIVES),
        ("adapter.method", recipe.adapter.method, METHODS),
    )
    origins = origins or {}
    return [
        Problem(f"this version cannot train {value} yet", origins.get(key), key, f"it trains {', '.join(known)}")
        for key, value, known in asked
        if value not in known
    ]


def check_trainable(recipe: Recipe, origins: Mapping[str, str] | None = None) -> None:
    """Raises :class:`UserError` for a recipe that this version cannot train."""
    problems = untrainable(recipe, origins)
    if problems:
        raise UserError(problems)
