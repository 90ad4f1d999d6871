"""PyYAML's syntax errors in plain words."""

from __future__ import annotations

import re
from typing import Any

import yaml

Explained = tuple[Any, str, str]
"""PyYAML's mark (or None), what is wrong, what to do."""


def explain(error: yaml.MarkedYAMLError) -> Explained:
    """Where a syntax error stands, what it is, and what to do about it.

    PyYAML points to where it gave up; for what was opened and never closed, the opening is what a user looks for.
    """
    problem, context = str(error.problem or ""), str(error.context or "")
    place, opened = error.problem_mark or error.context_mark, error.context_mark or error.problem_mark
    for pattern, at_opening, what, hint in _WORDS:
        match = re.search(pattern, f"{context}; {problem}")
        if match:
            found = match.groupdict().get("char", "")
            return (opened if at_opening else place), what.format(char=found), hint
    return place, f"not valid YAML: {problem or context}", "check the quotes, brackets and indentation around here"


_QUOTE_IT = "text that holds ': ' or ' #', or starts with a sign of YAML's own, needs quotes"
_WORDS = [
    (r"character '\\t'", False, "a tab stands here, YAML is indented with spaces", "replace tabs with spaces"),
    (r"quoted scalar; found unexpected end", True, "a quote is opened here and never closed", "close it"),
    (r"quoted scalar; found unexpected document", True, "a quote is opened here and never closed", "close it"),
    (r"unknown escape character '(?P<char>.+)'", False, "\\{char} is no escape in double quotes", "use single quotes"),
    (
        r"expected ',' or '\]'",
        True,
        "a [ is opened here and not closed as it should be",
        "check commas and the closing ]",
    ),
    (
        r"expected ',' or '}'",
        True,
        "a {{ is opened here and not closed as it should be",
        "check commas and the closing }",
    ),
    (
        r"mapping values are not allowed",
        False,
        "a ':' stands where none can",
        _QUOTE_IT + "; else check the indentation",
    ),
    (r"could not find expected ':'", True, "a key without ':'", "write key: value; " + _QUOTE_IT),
    (r"block collection.*expected <block end>", False, "does not fit the list above", "indent it as the lines above"),
    (r"block mapping.*expected <block end>", False, "does not fit the keys above", "indent it as the lines above"),
    (
        r"sequence entries are not allowed",
        False,
        "a list entry '-' stands where none can",
        "put it on a line of its own",
    ),
    (r"character '(?P<char>.+)' that cannot start", False, "{char} cannot start a value", "put the text in quotes"),
    (
        r"undefined tag handle",
        False,
        "a tag is not allowed here, a recipe is plain YAML",
        "remove it, or quote the text",
    ),
    (r"expected the node content", False, "a value or a closing bracket is missing here", "add it, or quote the text"),
    (r"incompatible YAML document", False, "another version of YAML is asked for", "remove the %YAML line"),
    (
        r"while (scanning|parsing) an? (tag|directive|alias|anchor)",
        True,
        "'!', '%', '&' or '*' starts a word",
        _QUOTE_IT,
    ),
    (r"did not find expected <document start>", False, "a value stands after the end of the document", _QUOTE_IT),
]


def one_line(text: str, limit: int = 80) -> str:
    """A text from a file as it can stand in one line of a report."""
    printable = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return printable + ("…" if len(text) > limit else "")
