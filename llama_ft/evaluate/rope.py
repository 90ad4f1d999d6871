"""`--rope`: a RoPE scaling for a model by itself, by the rules of a recipe's `model.rope_scaling`."""

from __future__ import annotations

from dataclasses import replace

from llama_ft.errors import UserError
from llama_ft.recipe.load import load_recipe
from llama_ft.recipe.schema_model import RopeScaling

SECTION = "model.rope_scaling"
HOST = "quickstart"
"""A shipped recipe that the scaling is put into, so that a recipe's own rules judge it, in a recipe's own words."""


def read_rope(said: str) -> RopeScaling:
    """The scaling that is written as YAML: `{rope_type: yarn, factor: 2}`. UserError with every mistake in it."""
    try:
        # Few tokens: how far the host's own base reads is not to be judged.
        recipe = load_recipe(HOST, ["sequence.max_length=16", f"{SECTION}={said}"], look_up=False)
    except UserError as error:
        raise UserError(
            replace(one, where=None, key="--rope" + (one.key or "").removeprefix(SECTION)) for one in error.problems
        ) from None
    if recipe.model.rope_scaling is None:
        raise UserError("no scaling was named", key="--rope", hint="--rope '{rope_type: yarn, factor: 2}'")
    return recipe.model.rope_scaling


def rope_name(scaling: RopeScaling) -> str:
    """A short name of a scaling, for a subject and its files: `yarn-2`, `theta-1e+06`, `linear-4-theta-500000`."""
    parts = []
    for name, value in scaling.parameters().items():
        if name == "rope_type":
            parts += [value] if value != "default" else []
        else:
            short = {"factor": "", "rope_theta": "theta-"}.get(name, f"{name}-")
            parts.append(f"{short}{value:g}" if not isinstance(value, bool) else f"{short}{value}")
    return "-".join(parts)
