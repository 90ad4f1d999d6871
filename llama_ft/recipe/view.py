"""A shaped recipe by dotted key: values with their defaults, and places to blame."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llama_ft.recipe.fields import fields_of, section_models
from llama_ft.recipe.nodes import Findings, Mark, is_null
from llama_ft.recipe.shape import Shaped


class Unknown(LookupError):
    """A key has no value to judge, because it is wrong, missing, or in a parent that cannot be read."""


@dataclass
class View:
    """What checks and look-ups see of a recipe."""

    shaped: Shaped
    findings: Findings
    complete: bool = True

    def value(self, key: str) -> Any:
        """The value of a dotted key, or its default. Raises :class:`Unknown` when there is neither."""
        if any(key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.") for bad in self.shaped.bad):
            raise Unknown(key)
        value: Any = self.shaped.data
        for part in key.split("."):
            index: Any = int(part) if isinstance(value, list) else part
            try:
                value = value[index]
            except (KeyError, IndexError, TypeError):
                return self._default(key)
        return value

    def stated(self, key: str) -> bool:
        """Whether a recipe file or an override gives the key a value, and not null."""
        entry = self.shaped.entries.get(key)
        return entry is not None and not is_null(entry.node)

    def stated_beside(self, key: str, choice: str) -> bool:
        """Whether a key is stated by whoever made the choice, or nearer. What a parent said before is no mistake."""
        return self.stated(key) and self.mark(key).source.nearness >= self.mark(choice).source.nearness

    def sources(self) -> list[str]:
        """The dotted keys of all sources of rows: `data.0`, …, `eval_data.0`, …"""
        lists = [name for name in ("data", "eval_data") if isinstance(self.shaped.data.get(name), list)]
        keys = [f"{name}.{number}" for name in lists for number in range(len(self.shaped.data[name]))]
        return [key for key in keys if key not in self.shaped.bad]

    def rewards(self) -> list[str]:
        """The dotted keys of all rewards: `rewards.0`, …"""
        count = len(self.shaped.data.get("rewards") or [])
        return [key for key in (f"rewards.{number}" for number in range(count)) if key not in self.shaped.bad]

    def replace(self, key: str, value: Any) -> None:
        """Puts a resolved value (an absolute path) in place of what was written, or of the default."""
        place: Any = self.shaped.data
        *parents, last = key.split(".")
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value

    def mark(self, key: str, *, of_value: bool = False) -> Mark:
        """Where a key is written; where its section or the recipe starts when it is not."""
        entry = self.shaped.entries.get(key)
        if entry is not None:
            return entry.node.mark if of_value else entry.mark
        section = key.rpartition(".")[0]
        return self.mark(section, of_value=of_value) if section else self.shaped.root

    def wrong(self, key: str, what: str, hint: str | None = None, *, of_value: bool = False) -> None:
        """Reports a mistake at a key."""
        self.findings.add(self.mark(key, of_value=of_value), what, key=key, hint=hint)

    def _default(self, key: str) -> Any:
        section, _, name = re.sub(r"\.\d+(?=\.|$)", ".0", key).rpartition(".")
        model = section_models().get(section)
        field = fields_of(model).get(name) if model else None
        if field is None or field.required or not self.complete:
            raise Unknown(key)
        return field.default
