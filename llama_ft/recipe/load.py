"""From a path and overrides to a validated Recipe, or to one report of everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from llama_ft.recipe.check import check
from llama_ft.recipe.extends import Chain, read_chain
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.lookup import resolve_names
from llama_ft.recipe.nodes import Entry, Findings
from llama_ft.recipe.objectives import unused_objective_keys, without
from llama_ft.recipe.overrides import apply_overrides
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.shape import shape
from llama_ft.recipe.view import View


@dataclass(frozen=True)
class Resolved:
    """A recipe with its history.

    `origins` names for each dotted key where its value came from: `file:line:column`, `override N` (from 1) or
    `default`. `files` are the recipe and its parents, nearest first. `launcher` is what the launch config asks for
    (None where names were not looked up).
    """

    recipe: Recipe
    origins: dict[str, str]
    files: list[Path]
    launcher: Launcher | None


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, look_up: bool = True) -> Recipe:
    """The validated recipe of a file, or of a shipped recipe's name, with `key=value` overrides applied.

    `look_up=False` takes names and paths as they stand and skips all checks that need them: for a finished run, whose
    data may be gone. Raises :class:`UserError` with every mistake of the recipe and its parents.
    """
    return resolve(path, overrides, look_up=look_up).recipe


def resolve(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, look_up: bool = True) -> Resolved:
    """As :func:`load_recipe`, with the origin of each value and the files that were read."""
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    findings = Findings()
    chain = read_chain(path, findings)
    if chain is None:
        apply_overrides(None, overrides, findings)
        findings.raise_if_any()
        raise AssertionError("a recipe that cannot be read leaves a finding")
    return _judge(chain, overrides, findings, look_up)


def _judge(chain: Chain, overrides: Sequence[str], findings: Findings, look_up: bool) -> Resolved:
    tree = apply_overrides(chain.tree, overrides, findings) or chain.tree
    shaped = shape(tree, findings, complete=chain.complete)
    view = View(shaped, findings, chain.complete)
    launcher = resolve_names(view) if look_up else None
    check(view, launcher)
    findings.raise_if_any()
    try:
        recipe = Recipe.model_validate(shaped.data)
        # What a parent said to another objective is no part of this recipe, which reads back equal from its dump.
        recipe = Recipe.model_validate(without(shaped.data, unused_objective_keys(recipe)))
    except ValidationError as error:  # the walk accepts only what pydantic does; should they differ, say so plainly
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            findings.add(shaped.root, f"the value of {key} is not accepted: {detail['msg']}", key=key)
        findings.raise_if_any()
        raise
    return Resolved(recipe, _origins(recipe, shaped.entries), chain.files, launcher)


def _origins(recipe: Recipe, entries: dict[str, Entry]) -> dict[str, str]:
    """Where each leaf of the resolved recipe came from."""
    origins: dict[str, str] = {}

    def walk(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else name)
        elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
            for number, part in enumerate(value):
                walk(part, f"{key}.{number}")
        else:
            origins[key] = str(entries[key].node.mark) if key in entries else "default"

    walk(recipe.model_dump(), "")
    return origins
