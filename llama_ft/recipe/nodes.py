"""What a recipe file says before it means anything: a tree of maps, lists and scalars, each with its place.

The places survive `extends` and overrides, so a mistake is reported where it was written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_ft.errors import Problem, UserError

Form = Literal[
    "text", "bool", "int", "float", "null", "empty", "legacy-bool", "legacy-number", "date", "non-finite", "huge"
]


@dataclass(frozen=True)
class Source:
    """A recipe file, or one override on the command line (`folder` is None: paths start in the working directory)."""

    label: str
    order: int
    folder: Path | None = None

    @property
    def nearness(self) -> float:
        """What is nearer wins: overrides before the recipe, the recipe before its parents."""
        return math.inf if self.folder is None else -self.order


@dataclass(frozen=True)
class Mark:
    """A place: 1-based line and column of a file, or line 0 of an override."""

    source: Source
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source.label}:{self.line}:{self.column}" if self.line else self.source.label

    @property
    def position(self) -> tuple[int, int, int]:
        """What sorts marks in the order a user reads: the recipe, its parents, then the overrides."""
        return self.source.order, self.line, self.column


@dataclass(frozen=True)
class Scalar:
    """A value without parts. `text` is what was written, `form` how YAML 1.2 reads it, `quoted` whether by quotes."""

    mark: Mark
    value: bool | int | float | str | None
    form: Form
    text: str
    quoted: bool = False
    size: int = 1


@dataclass(frozen=True)
class Items:
    """A list."""

    mark: Mark
    items: list[Node]
    size: int = 1


@dataclass(frozen=True)
class Entry:
    """One key of a map, with the place of the key itself."""

    mark: Mark
    node: Node


@dataclass(frozen=True)
class Map:
    """A map; `size` counts all values below it, aliases written out."""

    mark: Mark
    entries: dict[str, Entry]
    size: int = 1


@dataclass(frozen=True)
class Unreadable:
    """Stands where a mistake was already reported, so that it is not reported again as something else."""

    mark: Mark
    size: int = 1


Node = Scalar | Items | Map | Unreadable


@dataclass
class Findings:
    """All mistakes found so far, with their places."""

    found: list[tuple[Mark, Problem]] = field(default_factory=list)

    def add(self, mark: Mark, what: str, *, key: str | None = None, hint: str | None = None) -> None:
        """Notes one mistake."""
        self.found.append((mark, Problem(what, str(mark), key, hint)))

    def problems(self) -> list[Problem]:
        """Every mistake once, in file order."""
        ordered = sorted(self.found, key=lambda pair: pair[0].position)
        return list(dict.fromkeys(problem for _, problem in ordered))

    def raise_if_any(self) -> None:
        """Raises :class:`UserError` with everything found."""
        if self.found:
            raise UserError(self.problems())


def is_null(node: Node) -> bool:
    """Whether a value is an explicit `null`: back to the default."""
    return isinstance(node, Scalar) and node.form == "null"


def merge(parent: Node, child: Node) -> Node:
    """`extends`: maps merge key by key, anything else of the child replaces the parent's."""
    if not (isinstance(parent, Map) and isinstance(child, Map)):
        return child
    entries = dict(parent.entries)
    for key, entry in child.entries.items():
        known = entries.get(key)
        entries[key] = Entry(entry.mark, merge(known.node, entry.node)) if known else entry
    return Map(child.mark, entries, 1 + sum(entry.node.size for entry in entries.values()))


def plain(node: Node) -> Any:
    """The bare Python value of a node: dict, list or scalar."""
    if isinstance(node, Map):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return node.value if isinstance(node, Scalar) else None
