"""The schema seen from outside: every field with the type it takes, and which dotted key belongs to which section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from llama_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Field:
    """One key of a section: its full type (`Annotated`, a union, …), its default, its docstring."""

    name: str
    type: Any
    required: bool
    default: Any
    description: str

    @property
    def members(self) -> tuple[Any, ...]:
        """The alternatives of the type, each without its constraints and without None."""
        return tuple(_bare(member) for member in _alternatives(self.type) if member is not NoneType)

    @property
    def model(self) -> type[BaseModel] | None:
        """The section that a map at this key is, if a map can stand here."""
        return next((m for m in self.members if isinstance(m, type) and issubclass(m, BaseModel)), None)

    @property
    def item_model(self) -> type[BaseModel] | None:
        """The section that each entry of a list at this key is."""
        return self.item.model if self.item is not None else None

    @property
    def item(self) -> Field | None:
        """What one entry of a list at this key is, if a list can stand here."""
        for member in self.members:
            if get_origin(member) is list:
                return Field(self.name, get_args(member)[0], True, None, self.description)
        return None


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    bare = _bare(annotation)
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else (bare,)


@cache
def fields_of(model: type[BaseModel]) -> dict[str, Field]:
    """The keys of a section, in the order of the schema."""
    fields = {}
    for name, info in model.model_fields.items():
        whole = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        default = None if info.default is PydanticUndefined else info.default
        field = Field(name, whole, info.is_required(), default, "")
        text = info.description or (field.model.__doc__ if field.model else "") or ""
        fields[name] = replace(field, description=" ".join(text.split()))
    return fields


@cache
def section_models() -> dict[str, type[BaseModel]]:
    """Every section by its dotted key: `""` the recipe itself, `model`, `model.rope_scaling`, `data.0`, …"""
    sections: dict[str, type[BaseModel]] = {}

    def add(key: str, model: type[BaseModel]) -> None:
        sections[key] = model
        for name, field in fields_of(model).items():
            below = f"{key}.{name}" if key else name
            if field.model is not None:
                add(below, field.model)
            if field.item_model is not None:
                add(f"{below}.0", field.item_model)

    add("", Recipe)
    return sections


def leaves() -> Iterator[tuple[str, Field]]:
    """Every key with a value of its own, dotted; entries of lists as number 0."""
    for section, model in section_models().items():
        for name, field in fields_of(model).items():
            key = f"{section}.{name}" if section else name
            if field.model is None and not field.item_model:
                yield key, field
