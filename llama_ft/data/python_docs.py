"""The documentation of the user's own Python installation as text, offline: its modules' docstrings, its reference.

A module becomes one text: what stands in it about itself, then every documented class and function in the order of the
file, each under its signature. The language reference is what `help("assert")` shows: `pydoc_data` holds its topics.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

LEAST_CHARACTERS = 200
"""Of a text that is taken: less is a title."""

_Def = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = _Def | ast.ClassDef


def topics_file(root: Path) -> Path:
    """Where a standard library keeps its reference."""
    return root / "pydoc_data" / "topics.py"


def topics(text: str) -> dict[str, str]:
    """Name -> text of the topics in the source of `pydoc_data.topics`, in its order; none in another file."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(name): str(said).strip() for name, said in ast.literal_eval(node.value).items()}
    return {}


def documentation(module: str, tree: ast.Module) -> str | None:
    """All that a module says of itself, as one text; None for one that says next to nothing."""
    own = ast.get_docstring(tree)
    parts = [f"{module}\n{'=' * len(module)}", *([own] if own else [])]
    parts += [f"{head}\n\n{said}" for head, said in _documented(tree.body, "")]
    said = "\n\n".join(parts)
    return f"{said}\n" if len(said) - len(parts[0]) >= LEAST_CHARACTERS else None


def _documented(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of a body's public classes and functions; what is inside a function is its own affair."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _documented([*node.body, *node.orelse], owner)
        if not isinstance(node, _Documented) or (node.name.startswith("_") and not node.name.startswith("__")):
            continue
        said = ast.get_docstring(node)
        if said:
            yield _signature(node, owner), said
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, f"{owner}{node.name}.")


def _signature(node: _Documented, owner: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {owner}{node.name}{f'({bases})' if bases else ''}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{owner}{node.name}({ast.unparse(node.args)}){returns}"
