"""The tree of a recipe against the schema: every unknown key and every wrong value, in plain words.

pydantic judges each value; this walk knows where the value stands and what to say. What passed is kept, so that
combinations (check.py) are looked at even where other keys are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from llama_ft.errors import nearest
from llama_ft.recipe.fields import Field, fields_of
from llama_ft.recipe.nodes import Entry, Findings, Items, Map, Mark, Node, Scalar, is_null
from llama_ft.recipe.scalars import read_plain
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.words import expected, key_hint, shown
from llama_ft.recipe.yaml_words import one_line

_BAD = object()


@dataclass
class Shaped:
    """A recipe after the walk: `data` is what passed, `bad` the dotted keys that did not, `entries` all stated ones."""

    data: dict[str, Any]
    root: Mark
    entries: dict[str, Entry] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)


def shape(tree: Map, findings: Findings, *, complete: bool = True) -> Shaped:
    """Checks names and types of a whole recipe. `complete=False` (a parent is unreadable) asks for no missing key."""
    walk = _Walk(findings, complete, Shaped({}, tree.mark))
    walk.shaped.data = walk.section(Recipe, tree, "")
    return walk.shaped


@dataclass
class _Walk:
    findings: Findings
    complete: bool
    shaped: Shaped

    def wrong(self, mark: Mark, key: str, what: str, hint: str | None = None) -> Any:
        self.findings.add(mark, what, key=key, hint=hint)
        self.shaped.bad.add(key)
        return _BAD

    def section(self, model: type[BaseModel], node: Map, path: str) -> dict[str, Any]:
        fields, data = fields_of(model), {}
        for name, entry in node.entries.items():
            key = f"{path}.{name}" if path else name
            if name not in fields:
                self.wrong(entry.mark, one_line(key), f"unknown key '{one_line(name)}'", _unknown(name, model, path))
                continue
            self.shaped.entries[key] = entry
            if is_null(entry.node):
                continue
            value = self.value(fields[name], entry.node, key)
            if value is not _BAD:
                data[name] = value
        for name, info in fields.items():
            stated = name in node.entries and not is_null(node.entries[name].node)
            if info.required and not stated and self.complete:
                # A parent may be incomplete on purpose; the recipe that is read may not.
                is_whole = node.mark.source == self.shaped.root.source or path.rpartition(".")[2].isdigit()
                mark = node.entries[name].node.mark if name in node.entries else node.mark
                mark = mark if is_whole else self.shaped.root
                self.wrong(mark, f"{path}.{name}" if path else name, f"{name} is missing", _missing(info))
        return data

    def value(self, info: Field, node: Node, key: str) -> Any:
        """The value at a key whose field is known, or _BAD. Sections and lists are judged part by part."""
        if isinstance(node, Scalar):
            value = self.scalar(info, node, key)
        elif isinstance(node, Items):
            value = self.list(info, node, key)
        elif isinstance(node, Map):
            value = self.map(info, node, key)
        else:
            self.shaped.bad.add(key)
            value = _BAD
        is_judged = isinstance(node, Map) or (isinstance(node, Items) and node.items and info.item_model is not None)
        if value is _BAD or is_judged or _fits(info, value):
            return value
        return self.mismatch(info, node, key)

    def list(self, info: Field, node: Items, key: str) -> Any:
        if info.item is None:
            return self.mismatch(info, node, key)
        values = [self.item(info.item, item, f"{key}.{number}") for number, item in enumerate(node.items)]
        if info.item_model is not None:  # the other sources of a list are still worth a look
            return [{} if value is _BAD else value for value in values]
        return _BAD if any(value is _BAD for value in values) else values

    def map(self, info: Field, node: Map, key: str) -> Any:
        if info.model is None:
            return self.mismatch(info, node, key)
        # Where a list of sources may stand too, a map is the section only if it has one of its keys.
        if info.item is not None and not any(name in fields_of(info.model) for name in node.entries):
            return self.mismatch(info, node, key)
        return self.section(info.model, node, key)

    def item(self, info: Field, node: Node, key: str) -> Any:
        self.shaped.entries[key] = Entry(node.mark, node)
        if is_null(node):
            return self.wrong(
                node.mark, key, "this entry of the list is null", f"{expected(info)} is needed, or remove it"
            )
        return self.value(info, node, key)

    def scalar(self, info: Field, node: Scalar, key: str) -> Any:
        """The value of a scalar, refused where YAML readers disagree about what it is."""
        if node.form == "empty":
            hint = f"write {expected(info)} after the colon, or null for the default"
            return self.wrong(node.mark, key, f"{info.name} has no value", hint)
        if node.form in ("text", "bool", "int", "float"):
            return node.value
        return self.mismatch(info, node, key)

    def mismatch(self, info: Field, node: Node, key: str) -> Any:
        if isinstance(node, Scalar):
            what, hint = _scalar_words(info, node, key)
        else:
            what, hint = f"{info.name} is {shown(node)}, {expected(info)} is needed", _container_hint(info, node, key)
        return self.wrong(node.mark, key, what, hint)


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _fits(info: Field, value: Any) -> bool:
    try:
        _adapter(info.type).validate_python(value)
    except ValidationError:
        return False
    return True


def _unknown(name: str, model: type[BaseModel], path: str) -> str:
    if name == "holdout" and path.startswith("eval_data."):
        return "holdout stands alone, not in a list: eval_data: {holdout: 0.02}"
    if name == "type" and path == "model.rope_scaling":
        return "write rope_type, as transformers calls it since 4.45"
    if name == "extends":
        return "extends stands at the top of a recipe file"
    return key_hint(name, model, path)


def _missing(info: Field) -> str:
    """What to add for a required key: its name, its first key where it is a section, and what it is."""
    section = info.model or info.item_model
    first = f"{{{next(iter(fields_of(section)))}: …}}" if section else "…"
    return f"add '{info.name}: {f'[{first}]' if info.item_model else first}' ({info.description.rstrip('.')})"


_READ_AS = {
    "bool": "true or false",
    "legacy-bool": "true or false",
    "int": "a number",
    "float": "a number",
    "legacy-number": "a number",
    "huge": "a number",
    "non-finite": "a number",
    "date": "a date",
}


def _scalar_words(info: Field, node: Scalar, key: str) -> tuple[str, str | None]:
    """What is wrong with a scalar, and what to write instead."""
    if node.form in _READ_AS and _fits(info, "text"):
        what = f"{info.name} is {one_line(node.text)}, which YAML reads as {_READ_AS[node.form]}, text is needed"
        return what, f"quote it: {_quoted(node, key)}"
    what = f"{info.name} is {shown(node)}, {expected(info)} is needed"
    if node.form == "non-finite":
        return what, "infinity and NaN are no settings"
    if node.form == "huge":
        return what, "this is too long or too large to be meant"
    return what, _word_meant(info, node, key) or _list_or_section_meant(info, node)


def _word_meant(info: Field, node: Scalar, key: str) -> str | None:
    """What to write where true, false, a number or one of a few words is needed."""
    if _fits(info, True) and _as_bool(node.text):
        return "remove the quotes" if node.quoted and node.text in ("true", "false") else f"write {_as_bool(node.text)}"
    number = _number_meant(info, node)
    if number is not None:
        return "remove the quotes" if node.quoted else f"write {number}"
    words = _choices(info)
    if node.form != "text" and node.text in words:
        return f"quote it: {_quoted(node, key)}"
    near = nearest(node.text[:100].lower(), words)
    return f"did you mean '{near}'?" if near else None


def _list_or_section_meant(info: Field, node: Scalar) -> str | None:
    """What to write where one value stands in place of a list or of a section."""
    if info.item is not None and _fits(info, [node.value]):
        return f"write it as a list: [{one_line(node.text)}]"
    if info.model is None:
        return None
    first = next(iter(fields_of(info.model).values()))
    return f"write {{{first.name}: {one_line(node.text)}}}" if _fits(first, node.value) else "nest its keys below it"


def _quoted(node: Scalar, key: str) -> str:
    value = '"' + one_line(node.text, 40) + '"'
    return value if node.mark.line else f"'{key}={value}' on the command line"


def _as_bool(text: str) -> str | None:
    low = text.lower()
    return (
        "true"
        if low in ("yes", "on", "y", "true", "1")
        else "false"
        if low in ("no", "off", "n", "false", "0")
        else None
    )


def _number_meant(info: Field, node: Scalar) -> str | None:
    """The number that a text such as "2e-5", `1_000` or `16.0` stands for, if the key takes it."""
    digits = node.text.strip().replace("_", "").replace(",", "")
    form, value = read_plain(digits.lstrip("0") or "0")
    if form not in ("int", "float"):
        return None
    for candidate in (value, int(value) if isinstance(value, float) and value.is_integer() else value):
        if _fits(info, candidate):
            return str(candidate) if not isinstance(value, float) or isinstance(candidate, int) else digits
    return None


def _choices(info: Field) -> list[str]:
    """The words that a key takes, if it takes only certain words."""
    schema = _adapter(info.type).json_schema()
    words: list[str] = []
    for branch in [schema, *schema.get("anyOf", [])]:
        words += [word for word in branch.get("enum", []) if isinstance(word, str)]
        words += [branch["const"]] if isinstance(branch.get("const"), str) else []
    return words


def _container_hint(info: Field, node: Node, key: str) -> str | None:
    in_file = node.mark.line > 0
    if isinstance(node, Map):
        if info.item is not None:
            return "write '- ' before its first key" if in_file else f"name a position: {key}.0.…"
        return None if in_file else f"text with ': ' needs quotes: '{key}=\"…\"'"
    if isinstance(node, Items) and not node.items:
        return "give one" if info.required else f"remove {info.name} for its default"
    return "write its keys without '- '" if info.model is not None and info.item is None else None
