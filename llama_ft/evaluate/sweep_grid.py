"""`key=v1,v2` on the command line as a grid: which keys have several values, and the points that these span."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from llama_ft.errors import Problem, UserError
from llama_ft.recipe.overrides import OVERRIDE

LONGEST = 40
"""Characters of a value in a point's name; a longer one, or one with signs that a shell minds, gets a hash."""
OPENING, CLOSING = "[{", "]}"
QUOTED = re.compile(r"""'(?:''|[^'])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
"""A text in YAML's quotes, of either kind."""
REFUSED = {"output_dir": "name the folder of the sweep with --out FOLDER", "extends": "write a recipe that extends it"}
"""Keys that cannot stand in a grid, and what to do instead."""


@dataclass(frozen=True)
class Axis:
    """A key with all its values as they were written, in their order; one value is a plain override."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its folder's name, the swept values by key, and every override in the order of the line."""

    name: str
    values: dict[str, str]
    overrides: tuple[str, ...]


def read_grid(words: Sequence[str]) -> list[Axis]:
    """The axes of a command line. UserError with all that is wrong with its writing.

    What a value means is the recipe's to judge: here only `key=`, commas and brackets count.
    """
    axes: list[Axis] = []
    problems = []
    for number, word in enumerate(words, 1):
        key, equals, raw = word.partition("=")
        where = f"override {number}"
        if not equals or not OVERRIDE.match(word):
            hint = "write it as training.learning_rate=1e-4,2e-4"
            problems.append(Problem(f"'{word}' is no KEY=VALUE", where, None, hint))
            continue
        if key in REFUSED:
            problems.append(Problem("this key is no part of a sweep", where, key, REFUSED[key]))
            continue
        if key in (axis.key for axis in axes):
            problems.append(Problem("this key stands twice", where, key, f"write all values at once: {key}=A,B"))
            continue
        values = tuple(cut(raw))
        if "" in values:
            what = "nothing stands after '='" if len(values) == 1 else f"a value is missing in '{raw}'"
            hint = f"write {key}=null for the default, or quote a text with a comma: {key}='\"a, b\"'"
            problems.append(Problem(what, where, key, hint))
            continue
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            problems.append(Problem(f"a value stands twice: {', '.join(twice)}", where, key, "a point is trained once"))
        axes.append(Axis(key, values))
    if problems:
        raise UserError(problems)
    return axes


def cut(raw: str) -> list[str]:
    """The values of one key: `raw` cut at each comma that stands outside of brackets and quotes.

    >>> cut("1e-4,[q_proj, v_proj],'a, b'")
    ['1e-4', '[q_proj, v_proj]', "'a, b'"]
    """
    parts, start, depth, place, before = [], 0, 0, 0, ","
    while place < len(raw):
        sign = raw[place]
        # As YAML has it: quotes open at the start of a value, within a word an apostrophe is a letter.
        quoted = QUOTED.match(raw, place) if before in f",:{OPENING}" else None
        if quoted:
            place = quoted.end() - 1
        elif sign in OPENING:
            depth += 1
        elif sign in CLOSING:
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(raw[start:place].strip())
            start = place + 1
        before = before if sign.isspace() else sign
        place += 1
    return [*parts, raw[start:].strip()]


def points(axes: Sequence[Axis]) -> list[Point]:
    """Every combination, the last key's values changing fastest. Without a swept key one point named `only`."""
    swept = [axis for axis in axes if len(axis.values) > 1]
    names = short_keys([axis.key for axis in swept])
    found = []
    for chosen in product(*(axis.values for axis in axes)):
        said = dict(zip((axis.key for axis in axes), chosen, strict=True))
        values = {axis.key: said[axis.key] for axis in swept}
        name = "_".join(f"{names[key]}-{plain(value)}" for key, value in values.items()) or "only"
        found.append(Point(name, values, tuple(f"{key}={value}" for key, value in said.items())))
    return found


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by the least of its last parts that no other key ends on: `adapter.r` is `r`, with dots as hyphens."""
    found = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[place:]) for place in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in keys if other != key]
        short = next((one for one in endings if not any(other.endswith(f".{one}") for other in others)), key)
        found[key] = short.replace(".", "-")
    return found


def plain(value: str) -> str:
    """A value as a part of a folder's name; what had to be left out is told apart by a hash."""
    name = re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-.")
    if name == value and len(name) <= LONGEST:
        return name
    mark = hashlib.sha256(value.encode()).hexdigest()[:6]
    return f"{name[:LONGEST].rstrip('-.')}-{mark}".lstrip("-")
