"""`recipes`, `validate`, `show` and `schema`: what they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_ft.errors import Problem, UserError
from llama_ft.recipe.emit import lines
from llama_ft.recipe.extends import label, shipped_recipes
from llama_ft.recipe.load import Resolved, resolve
from llama_ft.recipe.overrides import OVERRIDE
from llama_ft.recipe.schema import Recipe

COLUMNS = ("recipe", "family", "base", "method", "hardware", "reproduces")
_COMMENT_COLUMN = 60


def print_catalog() -> None:
    """Prints the shipped recipes as a table; aligned, unwrapped plain text when not on a terminal."""
    rows = [_catalog_row(name, path) for name, path in shipped_recipes().items()]
    if not sys.stdout.isatty():
        widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
        for row in [COLUMNS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("recipe", "base", "method"))
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def validate_recipes(args: list[str]) -> None:
    """Prints one line per valid recipe: name, family, method and base.

    `args` mixes recipes and overrides for all of them.

    Raises :class:`UserError` with the mistakes of every recipe that is not valid.
    """
    recipes = [arg for arg in args if not _is_override(arg)]
    overrides = [arg for arg in args if _is_override(arg)]
    if not recipes:
        hint = "llama-ft validate RECIPE… [key=value…]; `llama-ft recipes` lists them"
        raise UserError("no recipe is named", hint=hint)
    problems: list[Problem] = []
    for path in recipes:
        try:
            resolved = resolve(path, overrides)
        except UserError as error:
            problems += error.problems
        else:
            recipe = resolved.recipe
            row = [recipe.name, family(resolved.files[0]), recipe.adapter.method, recipe.model.base]
            print("\t".join(row))
    if problems:
        sys.stdout.flush()
        raise UserError(dict.fromkeys(problems))


def print_resolved(recipe: str, overrides: Iterable[str]) -> None:
    """Prints the resolved recipe as YAML, each value with a comment that says where it came from."""
    resolved = resolve(recipe, overrides)
    rows = [(text, _origin(resolved, key)) for text, key in lines(resolved.recipe)]
    column = min(_COMMENT_COLUMN, max(len(text) for text, origin in rows if origin) + 2)
    head = "# files: " + ", ".join(label(path) for path in resolved.files)
    if not sys.stdout.isatty():
        print(head)
        for text, origin in rows:
            print(f"{text.ljust(column)}# {origin}" if origin else text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(head, style="dim"))
    for text, origin in rows:
        line = Text(text.ljust(column) if origin else text)
        line.append(f"# {origin}" if origin else "", style="dim" if origin == "default" else "cyan")
        console.print(line)


def print_schema() -> None:
    """Prints the JSON Schema of a recipe file."""
    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe *file*: `extends` is a key, any key may be null, a parent may give what is missing."""
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for name, value in section["properties"].items():
            section["properties"][name] = _or_null(value)
    for name in ("Model", "RopeScaling", "Reproduces", "Holdout"):
        schema["$defs"][name].pop("required", None)
    parent = {
        "type": "string",
        "title": "Extends",
        "description": "Path or name of the parent recipe: maps merge, lists replace.",
    }
    schema["properties"] = {"extends": _or_null(parent), **schema["properties"]}
    required = schema.pop("required")
    schema["anyOf"] = [{"required": ["extends"]}, {"required": required}]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "llama_ft recipe"
    return schema


def family(path: Path) -> str:
    """The folder of a recipe below `recipes/`; `-` for a recipe that stands outside of a family."""
    return path.parent.name if path.parent.parent.name == "recipes" else "-"


def _catalog_row(name: str, path: Path) -> tuple[str, ...]:
    try:
        resolved = resolve(path)
    except UserError as error:
        return name, family(path), "-", "-", "-", f"not valid here ({len(error.problems)}): validate {name} says why"
    recipe = resolved.recipe
    assert resolved.launcher is not None
    what = recipe.reproduces.what if recipe.reproduces else "-"
    return name, family(path), recipe.model.base, recipe.adapter.method, resolved.launcher.hardware, what


def _is_override(arg: str) -> bool:
    return OVERRIDE.match(arg) is not None and not os.path.isfile(arg)  # noqa: PTH113 (a NUL makes Path.is_file raise)


def _origin(resolved: Resolved, key: str) -> str:
    return resolved.origins.get(key, "") if key else ""


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    """A property that may also be null, which means its default; its description stays in sight of the editor."""
    if {"type": "null"} in value.get("anyOf", []):
        return value
    outer: dict[str, Any] = {name: value[name] for name in ("title", "description", "default") if name in value}
    inner = {name: part for name, part in value.items() if name not in outer}
    return {**outer, "anyOf": [*(inner["anyOf"] if set(inner) == {"anyOf"} else [inner]), {"type": "null"}]}
