"""A resolved recipe as YAML text, which reads back to an equal recipe."""

from __future__ import annotations

import re
from typing import Any

from llama_ft.recipe.check_adapter import unused_adapter_keys
from llama_ft.recipe.check_training import unused_training_keys
from llama_ft.recipe.objectives import unused_objective_keys, without
from llama_ft.recipe.scalars import read_plain
from llama_ft.recipe.schema import Recipe

_PLAIN = re.compile(r"[A-Za-z/_.][\w ./+()-]*(?<! )", re.ASCII)
_WIDTH = 100


def dump(recipe: Recipe) -> str:
    """The YAML text of a resolved recipe; :func:`load_recipe` reads it back to an equal one."""
    return "".join(f"{text}\n" for text, _ in lines(recipe))


def lines(recipe: Recipe) -> list[tuple[str, str]]:
    """The text, line by line, each with the dotted key whose value stands on it (`""` where none does)."""
    result: list[tuple[str, str]] = []
    _map(meant(recipe), "", 0, result)
    return result


def meant(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested dicts, without what means nothing beside the objective, method, type or schedule that was
    chosen: it is refused where it is stated, and what a parent said of it is of no account.
    """
    data = without(recipe.model_dump(), unused_objective_keys(recipe))
    for section, names in (("adapter", unused_adapter_keys(recipe)), ("training", unused_training_keys(recipe))):
        data[section] = {name: value for name, value in data[section].items() if name not in names}
    if recipe.model.rope_scaling is not None:
        data["model"]["rope_scaling"] = recipe.model.rope_scaling.parameters()
    return data


def _map(data: dict[str, Any], path: str, indent: int, result: list[tuple[str, str]]) -> None:
    for name, value in data.items():
        key = f"{path}.{name}" if path else name
        lead = " " * indent + f"{scalar(name)}:"
        if isinstance(value, dict) and value:
            result.append((lead, ""))
            _map(value, key, indent + 2, result)
        elif isinstance(value, list) and not _fits_a_line(value, len(lead)):
            result.append((lead, "" if isinstance(value[0], dict) else key))
            _items(value, key, indent + 2, result)
        else:
            result.append((f"{lead} {_inline(value)}", key))


def _items(items: list[Any], path: str, indent: int, result: list[tuple[str, str]]) -> None:
    for number, item in enumerate(items):
        if isinstance(item, dict) and item:
            start = len(result)
            _map(item, f"{path}.{number}", indent + 2, result)
            text, key = result[start]
            result[start] = (f"{' ' * indent}- {text.lstrip()}", key)
        else:
            result.append((f"{' ' * indent}- {_inline(item)}", ""))


def _fits_a_line(items: list[Any], used: int) -> bool:
    return not any(isinstance(item, dict) and item for item in items) and used + len(_inline(items)) < _WIDTH


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {_inline(part)}" for key, part in value.items()) + "}"
    return scalar(value)


def scalar(value: bool | int | float | str | None) -> str:
    """A value on one line, read the same by YAML 1.1 and 1.2."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        # YAML 1.1 takes 2e-05 for text, 2.0e-05 for a number.
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + (f"e{exponent}" if e else "")
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and read_plain(value)[0] == "text":
        return value
    return '"' + "".join(_escape(char) for char in value) + '"'


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    code = ord(char)
    if char.isprintable() and code != 0xFEFF:
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
