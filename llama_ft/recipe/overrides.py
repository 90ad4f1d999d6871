"""`training.learning_rate=1e-4` on the command line: parsed by the rules of YAML, put into the tree of the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable

import yaml

from llama_ft.recipe.fields import Field, fields_of
from llama_ft.recipe.nodes import Entry, Findings, Items, Map, Mark, Node, Scalar, Source, is_null
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.words import key_hint, shown
from llama_ft.recipe.yaml_reader import Broken, parse
from llama_ft.recipe.yaml_words import one_line

OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=", re.DOTALL)
"""How an override starts; what does not start so is a recipe's path."""

_FIRST = 1_000_000  # overrides are read, and reported, after every file


class _Refused(Exception):
    """This override cannot be applied; the reason is in the findings."""


def apply_overrides(tree: Map | None, overrides: Iterable[str], findings: Findings) -> Map | None:
    """The tree with every override put in, in order. Mistakes go to `findings`, as `override N` (from 1).

    Without a tree (the recipe cannot be read) only the writing of the overrides themselves is judged.
    """
    for number, text in enumerate(overrides, 1):
        mark = Mark(Source(f"override {number}", _FIRST + number))
        try:
            keys, value = _parse(text, mark, findings)
            if tree is not None:
                merged = _put(tree, keys, value, mark, _Place([], None, findings))
                assert isinstance(merged, Map)
                tree = merged
        except (_Refused, Broken):
            continue
    return tree


def _parse(text: str, mark: Mark, findings: Findings) -> tuple[list[str], Node]:
    key, equals, raw = text.partition("=")

    def refuse(what: str, hint: str) -> _Refused:
        findings.add(mark, what, key=one_line(key) or None, hint=hint)
        return _Refused()

    if not equals:
        raise refuse(f"'{one_line(text)}' has no '='", f"write {one_line(key)}=VALUE")
    if not OVERRIDE.match(text):
        raise refuse(f"'{one_line(key)}' is no dotted key", "write it as training.learning_rate=1e-4")
    if key == "extends":
        raise refuse("extends cannot be overridden", "write a recipe of a few lines that extends the other parent")
    if not raw.strip():
        raise refuse("nothing stands after '='", f"write {key}=null for the default, or '{key}=\"\"' for an empty text")
    node = parse(raw, mark.source, findings, key=key)
    if node is None:
        raise refuse(f"'{one_line(raw)}' holds no value", f"quote it: '{key}=\"{one_line(raw)}\"'")
    if isinstance(node, Scalar) and not node.quoted and _cut(raw):
        raise refuse(f"YAML reads '{one_line(raw)}' only up to ' #'", f"quote it: '{key}=\"{one_line(raw)}\"'")
    return key.split("."), node


def _cut(raw: str) -> bool:
    """Whether a comment sign ends an unquoted value early."""
    loader = yaml.SafeLoader(raw)
    event = next(event for event in iter(loader.get_event, None) if isinstance(event, yaml.ScalarEvent))
    return event.end_mark is not None and event.end_mark.index < len(raw.rstrip())


class _Place:
    """Where an override has got to: the keys walked, and the schema's field there."""

    def __init__(self, walked: list[str], field: Field | None, findings: Findings):
        self.walked, self.field, self.findings = walked, field, findings

    def refuse(self, mark: Mark, keys: list[str], what: str, hint: str | None) -> _Refused:
        self.findings.add(mark, what, key=".".join([*self.walked, *keys]), hint=hint)
        return _Refused()

    def model(self):
        return Recipe if not self.walked else self.field.model if self.field else None

    def below(self, name: str) -> _Place:
        model = self.model()
        field = fields_of(model).get(name) if model else None
        return _Place([*self.walked, name], field, self.findings)

    def entry(self, index: str) -> _Place:
        return _Place([*self.walked, index], self.field.item if self.field else None, self.findings)


def _put(node: Node | None, keys: list[str], value: Node, mark: Mark, place: _Place) -> Node:
    """A copy of `node` with `value` at `keys` below it; what is missing on the way is made."""
    if not keys:
        return value
    name, *rest = keys
    if isinstance(node, Items) and re.fullmatch(r"\d{1,9}", name):
        count, index = len(node.items), int(name)
        if index >= count:
            held = f"{place.walked[-1]} has {count} {'entry' if count == 1 else 'entries'}, numbered from 0"
            hint = f"the last is {'.'.join(place.walked)}.{count - 1}" if count else "give the whole list"
            raise place.refuse(mark, keys, held, hint)
        items = list(node.items)
        items[index] = _put(items[index], rest, value, mark, place.entry(name))
        return Items(node.mark, items, node.size + value.size)
    model = place.model()
    if name.isdigit() or model is None or (isinstance(node, Items) and name not in fields_of(model)):
        raise place.refuse(mark, keys, *_no_keys_below(node, place, name))
    if name not in fields_of(model):
        hint = key_hint(name, model, ".".join(place.walked))
        raise place.refuse(mark, keys, f"unknown key '{one_line(name)}'", hint)
    # A map replaces a list here as it does in extends: eval_data.holdout=0.1 over a list of sources.
    entries = dict(node.entries) if isinstance(node, Map) else {}
    if isinstance(node, Scalar) and not is_null(node) and node.form != "empty":
        what = f"{place.walked[-1]} is {shown(node)} in the recipe, it has no keys"
        raise place.refuse(mark, keys, what, "mend the recipe first")
    known = entries.get(name)
    below = _put(known.node if known else None, rest, value, mark, place.below(name))
    entries[name] = Entry(known.mark if known and rest else mark, below)
    return Map(node.mark if isinstance(node, Map) else mark, entries, value.size)


def _no_keys_below(node: Node | None, place: _Place, name: str) -> tuple[str, str | None]:
    """Why there is nothing named `name` below the place reached."""
    here, last = ".".join(place.walked), place.walked[-1]
    item = place.field.item if place.field else None
    if item is not None and item.model is not None:
        if isinstance(node, Items):
            what = f"{last} is a list, a position is needed before '{one_line(name)}'"
            return what, f"write {here}.0.{one_line(name)}=…"
        return f"{last} is no list in this recipe", f"write the whole list: '{here}=[{{use: …}}]'"
    if item is not None:
        return f"{last} is a list of values", f"write the whole list: {here}=[…]"
    return f"{last} has no keys below it", f"write {here}=…"
