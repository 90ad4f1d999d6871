"""What an unquoted word means: YAML 1.2's core schema, and a warning label on what YAML 1.1 reads differently.

Source of the rules: https://yaml.org/spec/1.2.2/ section 10.3.2. PyYAML follows YAML 1.1, where `1e-4` is a string,
`no` is false and `1_000` is a thousand; a recipe never depends on which of the two a reader follows.
"""

from __future__ import annotations

import math
import re

from llama_ft.recipe.nodes import Form

Value = bool | int | float | str | None

MAX_NUMBER_LENGTH = 40
"""Longer numbers are refused: Python's conversion is quadratic, and no key of a recipe needs one."""

_NULL = {"~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_LEGACY_BOOL = {word for base in ("yes", "no", "on", "off") for word in (base, base.capitalize(), base.upper())}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Octal with a leading zero, underscores, binary, and base 60 (`1:30` is 90): numbers in YAML 1.1 alone.
_LEGACY_NUMBER = re.compile(
    r"[-+]?0[0-9]+|[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0b[01_]+|[-+]?[1-9][0-9_]*(:[0-5]?[0-9])+"
)
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ][0-9:.+\-Zz ]*)?")

_TEXT_FORMS: tuple[tuple[Form, re.Pattern[str]], ...] = (
    ("non-finite", _NON_FINITE),
    ("legacy-number", _LEGACY_NUMBER),
    ("date", _DATE),
)


def read_plain(text: str) -> tuple[Form, Value]:
    """How an unquoted scalar is read: its form, and its value (the text itself where no number or word fits)."""
    word: tuple[Form, Value] | None = None
    if text == "":
        word = "empty", None
    elif text in _NULL:
        word = "null", None
    elif text in _BOOL:
        word = "bool", _BOOL[text]
    elif text in _LEGACY_BOOL:
        word = "legacy-bool", text
    return word or _read_number(text)


def _read_number(text: str) -> tuple[Form, Value]:
    for form, pattern in _TEXT_FORMS:
        if pattern.fullmatch(text):
            return form, text
    is_int = _INT.fullmatch(text)
    if not is_int and not _FLOAT.fullmatch(text):
        return "text", text
    if len(text) > MAX_NUMBER_LENGTH:
        return "huge", text
    if is_int:
        return "int", int(text, 0)
    number = float(text)
    return ("float", number) if math.isfinite(number) else ("huge", text)
