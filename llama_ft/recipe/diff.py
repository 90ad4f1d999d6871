"""`llama-ft diff`: two resolved recipes key by key, each value with where it came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_ft.recipe.check_adapter import unused_adapter_keys
from llama_ft.recipe.check_training import unused_training_keys
from llama_ft.recipe.emit import scalar
from llama_ft.recipe.extends import label
from llama_ft.recipe.load import Resolved, resolve
from llama_ft.recipe.objectives import unused_objective_keys, value_at
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

_WIDEST = 48


@dataclass(frozen=True)
class Value:
    """What one recipe says: a scalar or a list of scalars, and `file:line:column`, `override N` or `default`."""

    value: Any
    origin: str

    def __str__(self) -> str:
        if isinstance(self.value, list):
            return f"[{', '.join(map(scalar, self.value))}]"
        return scalar(self.value)


@dataclass(frozen=True)
class Difference:
    """A dotted key in which two recipes differ; None where a recipe has no such key."""

    key: str
    a: Value | None
    b: Value | None


def open_side(name: str) -> Resolved:
    """A recipe's file or shipped name, a run folder, or a run.lock.json, whose recipe lies beside it.

    UserError with every mistake of a recipe that is not valid. A run's recipe is taken as it stands: the files that it
    names may have moved since.
    """
    path = Path(name)
    if path.name == "run.lock.json":
        return resolve(path.parent / "recipe.yaml", look_up=False)
    if path.is_dir():
        return resolve(Run.open(path).recipe_file, look_up=False)
    return resolve(name)


def values(resolved: Resolved) -> dict[str, Value]:
    """Every key that means something beside what else the recipe chose, in the order of the schema."""
    recipe = resolved.recipe
    unused = {f"adapter.{name}" for name in unused_adapter_keys(recipe)}
    unused |= {f"training.{name}" for name in unused_training_keys(recipe)}
    unused |= {*unused_objective_keys(recipe)}
    data = recipe.model_dump()
    return {key: Value(value_at(data, key), origin) for key, origin in resolved.origins.items() if key not in unused}


def differences(a: Mapping[str, Value], b: Mapping[str, Value]) -> list[Difference]:
    """The keys whose values differ, in the order of the schema's sections.

    Of a section, or an entry of a list, that one recipe does not have only what the other states is told.
    """
    sections = list(Recipe.model_fields)
    keys = sorted([*a, *(key for key in b if key not in a)], key=lambda key: sections.index(key.partition(".")[0]))
    found = []
    for key in keys:
        one, other = a.get(key), b.get(key)
        if one is not None and other is not None:
            if not _same(one.value, other.value):
                found.append(Difference(key, one, other))
        elif (one or other or Value(None, "default")).origin != "default":
            found.append(Difference(key, one, other))
    return found


def _same(one: Any, other: Any) -> bool:
    """Equal, and not only as Python has it: 1 is not true; 2 and 2.0 are the same number."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def print_diff(name_a: str, name_b: str, *, as_json: bool = False) -> bool:
    """Prints how two recipes differ; returns whether they do."""
    one, other = open_side(name_a), open_side(name_b)
    a, b = values(one), values(other)
    found = differences(a, b)
    if as_json:
        print(json.dumps([asdict(line) for line in found], indent=2, ensure_ascii=False))
        return bool(found)
    heads = label(one.files[0]), label(other.files[0])
    equal = len({*a, *b}) - len(found)
    foot = f"{len(found)} {'key differs' if len(found) == 1 else 'keys differ'}, {equal} are equal"
    if sys.stdout.isatty():
        _print_coloured(found, heads, foot)
    else:
        _print_plain(found, heads, foot)
    return bool(found)


def _print_plain(found: list[Difference], heads: tuple[str, str], foot: str) -> None:
    """One line per key in aligned columns, unwrapped: key, value and origin of both.

    A long value moves what stands right of it, on its own line alone.
    """
    rows = [("key", heads[0], "", heads[1], "")]
    rows += [(line.key, *_cells(line.a), *_cells(line.b)) for line in found]
    widths = [max(len(row[column]) for row in rows if len(row[column]) <= _WIDEST) for column in range(5)]
    for row in rows if found else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(foot)


def _print_coloured(found: list[Difference], heads: tuple[str, str], foot: str) -> None:
    """A block per key, as a diff of texts has it, which any width can hold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(f"--- {heads[0]}", style="red"))
    console.print(Text(f"+++ {heads[1]}", style="green"))
    for line in found:
        console.print(Text(line.key, style="bold"))
        for sign, value, style in (("-", line.a, "red"), ("+", line.b, "green")):
            if value is not None:
                text = Text(f"  {sign} {value}", style=style)
                console.print(text.append(f"  {value.origin}", style="dim"))
    console.print(Text(foot, style="dim"))


def _cells(value: Value | None) -> tuple[str, str]:
    return ("-", "") if value is None else (str(value), value.origin)
