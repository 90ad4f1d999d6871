"""The tables of docs/recipes.md, from the schema: `python -m llama_ft.recipe.reference` prints them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from llama_ft.recipe.emit import scalar
from llama_ft.recipe.fields import Field, fields_of, section_models
from llama_ft.recipe.words import expected


def key_tables() -> str:
    """Markdown: one table per section, each key with what it takes, its default and its meaning."""
    return "\n".join(_table(section, model) for section, model in section_models().items() if section != "eval_data.0")


def _table(section: str, model: type[BaseModel]) -> str:
    title = {"": "The recipe", "data.0": "`data[]` and `eval_data[]`"}.get(section, f"`{section}`")
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    if not section:
        rows.append("| `extends` | text | `null` | The parent recipe: its path, or the name of a shipped one. |")
    rows += [_row(field) for field in fields_of(model).values()]
    return "\n".join([f"### {title}", "", " ".join((model.__doc__ or "").split()), "", *rows, ""])


def _row(field: Field) -> str:
    takes = expected(field).replace("|", "\\|")
    return f"| `{field.name}` | {takes} | {_default(field)} | {field.description} |"


def _default(field: Field) -> str:
    if field.required:
        return "*required*"
    value: Any = field.default
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, list):
        return f"`[{', '.join(map(scalar, value))}]`"
    return f"`{scalar(value)}`"


if __name__ == "__main__":
    print(key_tables(), end="")
