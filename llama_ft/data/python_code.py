"""The user's own Python installation as a data set: real code with real documentation, offline.

`docstrings` gives every documented function of the standard library twice: its description asks for its code, and its
code asks for its description. As text, `files` gives whole modules, `long-files` the long ones of these, `functions`
the code of the documented functions, `docs` what modules say of themselves, `reference` the language reference. One
Python version always gives the same rows.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_ft.data.problems import Problems
from llama_ft.data.python_docs import LEAST_CHARACTERS, documentation, topics, topics_file
from llama_ft.data.python_functions import Function, functions
from llama_ft.errors import UserError

What = Literal["docstrings", "files", "long-files", "functions", "docs", "reference"]
SPLITS = ("train", "heldout")
LONG = 32_768
"""Characters of a long module: some 8,192 tokens, which have 3.9 characters in these files by SmolLM2's tokenizer."""
HELD_OUT = 0.03
"""Share of modules whose rows are held out, drawn by a hash of the module's name."""
HELD_OUT_TOPICS = 0.1
"""The same for the few topics of the reference."""

# Not the library itself, or no code to learn from: tests, demos, generated tables, what pip put there.
_LEFT_OUT = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "test", "tests", "idlelib", "lib2to3", "turtledemo"),
        *("encodings", "pydoc_data", "__phello__", "__pycache__"),
    }
)

_WRITE = (
    "Write the Python {kind} `{signature}` to this description:",
    "Implement the Python {kind} `{signature}`. It is documented like this:",
    "Here is what a Python {kind} `{signature}` has to do. Write its code.",
    "A Python {kind} is needed, `{signature}`. Write it from its documentation:",
)
_DESCRIBE = (
    "Write a docstring for this Python {kind}.",
    "Document this Python {kind}: what would its docstring say?",
    "Read this Python {kind} and describe what it does, as a docstring.",
    "What does this Python {kind} do? Answer with a docstring for it.",
)


def library() -> Path:
    """The folder of the standard library's modules, of the installation that a virtual environment was made from."""
    return Path(sysconfig.get_path("stdlib"))


def modules(root: Path, split: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of the modules of a split, sorted by name."""
    found = []
    for here, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for path in (Path(here, name) for name in names if name.endswith(".py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if _held_out(module) == (split == "heldout") and not module.startswith("_sysconfigdata"):
                found.append((module, path))
    return sorted(found)


def _held_out(module: str) -> bool:
    return _draw(module) % 1000 < HELD_OUT * 1000


def _draw(text: str) -> int:
    """A number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class PythonRows:
    """The rows of one split. `fingerprint` changes with the Python version and with any module's text."""

    what: What
    split: str
    root: Path
    label: str
    fingerprint: str
    revision: str

    def rows(self, problems: Problems) -> Generator[tuple[int, Any], None, None]:
        """Yields (row, value): alpaca rows with their `source`, or `{"text", "path"}`. Nothing is ever noted."""
        if self.what == "reference":
            yield from enumerate(_reference(self.root, self.split))
            return
        yield from enumerate(_MAKERS[self.what](self.root, modules(self.root, self.split)))

    def where(self, row: int) -> str:
        """Names a row in a message."""
        return f"{self.label}, row {row}"

    def unchanged(self) -> bool:
        """Whether the installation is the one that was opened."""
        return _fingerprint(self.root, self.split, self.what) == self.fingerprint


def open_python(what: What, split: str, *, root: Path | None = None, key: str | None = None) -> PythonRows:
    """Opens a split of the installed standard library, or of `root`; raises :class:`UserError` if it has no sources."""
    root = root or library()
    if not modules(root, split):
        hint = "install Python with its sources, or name a folder of code: path: FOLDER"
        raise UserError("this Python's standard library holds no .py files", where=str(root), key=key, hint=hint)
    if what == "reference" and not topics_file(root).is_file():
        hint = "install Python's documentation topics, or use python-docs"
        raise UserError("this Python holds no reference (pydoc_data/topics.py)", where=str(root), key=key, hint=hint)
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return PythonRows(what, split, root, f"{version} {what} ({split})", _fingerprint(root, split, what), version)


def _fingerprint(root: Path, split: str, what: What) -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    if what == "reference":
        digest.update(topics_file(root).read_bytes())
        return digest.hexdigest()
    for name, path in modules(root, split):
        digest.update(f"\n{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(root: Path, found: list[tuple[str, Path]]) -> Iterator[dict[str, str]]:
    for _, path in found:
        text = _text(path)
        if text is not None and text.strip():
            yield {"text": text, "path": path.relative_to(root).as_posix()}


def _docs(root: Path, found: list[tuple[str, Path]]) -> Iterator[dict[str, str]]:
    for module, path in found:
        text = _text(path)
        tree = _parsed(text) if text is not None else None
        said = documentation(module, tree) if tree is not None else None
        if said is not None:
            yield {"text": said, "path": module}


def _reference(root: Path, split: str) -> Iterator[dict[str, str]]:
    for name, said in topics(topics_file(root).read_text(encoding="utf-8")).items():
        held_out = _draw(f"topic {name}") % 1000 < HELD_OUT_TOPICS * 1000
        if len(said) >= LEAST_CHARACTERS and held_out == (split == "heldout"):
            yield {"text": f"{said}\n", "path": name}


def _long_files(root: Path, found: list[tuple[str, Path]]) -> Iterator[dict[str, str]]:
    for row in _files(root, found):
        if len(row["text"]) >= LONG:
            yield row


def _functions(root: Path, found: list[tuple[str, Path]]) -> Iterator[dict[str, str]]:
    for name, function in _documented(found):
        yield {"text": function.code + "\n", "path": name}


def _docstrings(root: Path, found: list[tuple[str, Path]]) -> Iterator[dict[str, str]]:
    for name, function in _documented(found):
        yield from _both_ways(name, function)


def _documented(found: list[tuple[str, Path]]) -> Iterator[tuple[str, Function]]:
    """Documented functions with their dotted names, each code once."""
    seen: set[str] = set()
    for module, path in found:
        text = _text(path)
        tree = _parsed(text) if text is not None else None
        if text is None or tree is None:
            continue
        for function in functions(tree, text):
            if function.code not in seen:  # some modules carry copies of others' helpers
                seen.add(function.code)
                yield f"{module}.{function.name}", function


def _both_ways(source: str, function: Function) -> Iterator[dict[str, str]]:
    draw = _draw(source)
    ask = _WRITE[draw % len(_WRITE)].format(kind=function.kind, signature=function.signature)
    yield {"instruction": f"{ask}\n\n{function.description}", "input": "", "output": function.code, "source": source}
    ask = _DESCRIBE[draw // 7 % len(_DESCRIBE)].format(kind=function.kind)
    yield {"instruction": ask, "input": function.bare, "output": function.description, "source": source}


def _text(path: Path) -> str | None:
    """A module's text as Python reads it (PEP 263, line ends as \\n); None for one in no known encoding."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return None


_MAKERS = {
    "docstrings": _docstrings,
    "files": _files,
    "long-files": _long_files,
    "functions": _functions,
    "docs": _docs,
}
