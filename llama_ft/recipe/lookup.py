"""Names and paths in a recipe: found and made absolute, or reported with the nearest name that exists.

A path in a recipe file is looked up beside that file (the parent's own folder, if a parent wrote it), in the working
directory, then among the shipped files; a path in an override starts from the working directory.
"""

from __future__ import annotations

import ast
import glob
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from llama_ft.errors import did_you_mean, nearest
from llama_ft.paths import PACKAGE, find_file, shipped_root
from llama_ft.recipe.check_online import OWN_FUNCTION
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.recipe.nodes import Findings, Source, plain
from llama_ft.recipe.schema_model import PRESETS
from llama_ft.recipe.view import Unknown, View
from llama_ft.recipe.yaml_reader import read_file
from llama_ft.recipe.yaml_words import one_line

SHIPPED_BASE = "smollm2-135m"
CHECKPOINT_FILES = (".gguf", ".bin", ".pth", ".pt")
"""Endings of a base that is one file, not a folder (docs/import.md)."""
_HUB_ID_LENGTH = 96  # the hub's own limit
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_TEMPLATES = PACKAGE / "data" / "templates"


def resolve_names(view: View) -> Launcher | None:
    """Looks every name and path up, in place. Returns the launch config where it can be read.

    What is not found goes to the findings of `view`; nothing is raised.
    """
    for key in view.sources():
        _attempt(_data_path, view, f"{key}.path")
        _attempt(_card, view, f"{key}.use")
        _attempt(_split, view, f"{key}.split")
    with suppress(Unknown):
        for number in range(len(view.value("mixture.benchmarks"))):
            _attempt(_benchmark, view, f"mixture.benchmarks.{number}")
    for key in view.rewards():
        _attempt(_reward_model, view, f"{key}.model")
        _attempt(_own_function, view, f"{key}.function")
    _attempt(_template, view, "template")
    _attempt(_base, view, "model.base")
    _attempt(_tokenizer, view, "model.tokenizer")
    return _launch(view)


def shipped_cards() -> list[str]:
    """Names that `use:` takes."""
    return sorted(path.stem for path in (shipped_root() / "datasets").glob("*.yaml"))


def shipped_templates() -> list[str]:
    """Names that `template:` takes, `base` among them."""
    return sorted([*(path.stem for path in _TEMPLATES.glob("*.jinja")), "base"])


def _attempt(look: Callable[[View, str, str], None], view: View, key: str) -> None:
    with suppress(Unknown):
        text = view.value(key)
        if text is not None:
            look(view, key, text)


def _find(view: View, key: str, text: str, *, shipped: bool = True) -> Path | None:
    """The absolute path of what a key names, looked up from where the key was written."""
    folder = view.mark(key, of_value=True).source.folder
    try:
        if shipped or Path(text).expanduser().is_absolute():
            found = find_file(text, beside=folder)
        else:
            roots = [root for root in (folder, Path.cwd()) if root is not None]
            found = next((root / text for root in roots if (root / text).exists()), None)
        return found.resolve() if found is not None else None
    except (OSError, RuntimeError, ValueError):  # a name too long, no such user, a NUL
        return None


def _siblings(view: View, key: str, text: str, patterns: Iterable[str]) -> list[str]:
    """Names of files beside the one that was meant."""
    start = view.mark(key, of_value=True).source.folder or Path.cwd()
    try:
        folder = (start / Path(text).expanduser()).parent
        return [str(Path(text).parent / path.name) for pattern in patterns for path in folder.glob(pattern)]
    except (OSError, RuntimeError, ValueError):
        return []


def _refuse(view: View, key: str, what: str, hint: str) -> None:
    view.wrong(key, what, hint, of_value=True)
    view.shaped.bad.add(key)


def _missing(view: View, key: str, kind: str, names: list[str], beside: Iterable[str] = ()) -> None:
    """Reports a name that leads nowhere, with the nearest of the shipped `names` and of the files `beside` it."""
    text = view.value(key)
    near = nearest(text[:100], [*names, *beside])
    if near or names:
        hint = f"did you mean '{near}'?" if near else did_you_mean(text[:100], names, kind=f"{kind}s")
    else:
        from_here = view.mark(key, of_value=True).line == 0
        hint = "looked in the working directory" + ("" if from_here else " and beside the recipe")
    _refuse(view, key, f"no such {kind} '{one_line(text)}'", hint)


def _data_path(view: View, key: str, text: str) -> None:
    """A file, a folder, or a pattern, which becomes absolute where something matches it."""
    if re.match(r"[a-z][a-z0-9+.-]*://", text):
        what = f"'{one_line(text)}' is an address, rows are read from files"
        _refuse(view, key, what, "fetch it first, or write a card for a set on the hub")
        return
    found = _find(view, key, text)
    if found is None and glob.has_magic(text):
        folder = view.mark(key, of_value=True).source.folder
        roots = [root for root in (folder, Path.cwd(), shipped_root()) if root is not None]
        patterns = [Path(root, Path(text).expanduser()) for root in roots]
        pattern = next((one for one in patterns if glob.glob(str(one), recursive=True)), None)  # noqa: PTH207
        if pattern is not None:
            view.replace(key, os.path.abspath(pattern))  # noqa: PTH100 (Path.absolute leaves .. in)
            return
    if found is None:
        _missing(view, key, "file", [], _siblings(view, key, text, ("*.json*", "*.csv*", "*.txt*", "*.parquet")))
    else:
        view.replace(key, str(found))


def _benchmark(view: View, key: str, text: str) -> None:
    """A card's name, or a file of prompts."""
    if text not in shipped_cards():
        found = _find(view, key, text)
        if found is None:
            _missing(view, key, "card or file", shipped_cards())
        else:
            view.replace(key, str(found))


def _reward_model(view: View, key: str, text: str) -> None:
    """A folder, absolute where it exists. It need not: the run that writes it may come before this one's training."""
    found = _find(view, key, text, shipped=False)
    if found is not None and found.is_file():
        _refuse(view, key, f"'{one_line(text)}' is a file, a reward model is a folder", "name the run that trained it")
    elif found is not None:
        view.replace(key, str(found))


def _own_function(view: View, key: str, text: str) -> None:
    """FILE.py:NAME, which becomes absolute; the file is read, and not run."""
    named = OWN_FUNCTION.fullmatch(text)
    if named is None:
        return
    found = _find(view, key, named["file"])
    if found is None or not found.is_file():
        beside = [f"{name}:{named['name']}" for name in _siblings(view, key, named["file"], ("*.py",))]
        _missing(view, key, "file", [], beside)
        return
    try:
        body = ast.parse(found.read_bytes(), str(found)).body
    except (OSError, SyntaxError, ValueError) as error:
        _refuse(view, key, f"{found.name} cannot be read: {error}", "mend it; it is read as Python")
        return
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    imported = [name.asname or name.name for node in body if isinstance(node, ast.ImportFrom) for name in node.names]
    if named["name"] in (*functions, *imported):
        view.replace(key, f"{found}:{named['name']}")
    else:
        hint = (
            did_you_mean(named["name"][:100], functions, kind="functions") if functions else f"add def {named['name']}"
        )
        _refuse(view, key, f"{found.name} has no function '{named['name']}'", hint)


def _card(view: View, key: str, text: str) -> None:
    _named_file(view, key, "card", (".yaml", ".yml"), shipped_cards())


def _split(view: View, key: str, split: str) -> None:
    """A split that the card lacks. A card that cannot be read says nothing here; preparing the data reports it."""
    use = view.value(f"{key.rpartition('.')[0]}.use")
    if use is None or view.value(f"{key.rpartition('.')[0]}.path") is not None:
        return
    path = Path(use) if "/" in use else shipped_root() / "datasets" / f"{use}.yaml"
    tree = read_file(path, Source(use, 0, path.parent), Findings())
    source = plain(tree).get("source") if tree is not None else None
    splits = (source.get("files") or source.get("splits")) if isinstance(source, dict) else None
    if isinstance(splits, dict) and split not in splits:
        hint = did_you_mean(split[:100], map(str, splits), kind="splits")
        _refuse(view, key, f"the card {Path(use).stem} has no split '{one_line(split)}'", hint)


def _template(view: View, key: str, text: str) -> None:
    _named_file(view, key, "template", (".jinja",), shipped_templates())


def _named_file(view: View, key: str, kind: str, suffixes: tuple[str, ...], shipped: list[str]) -> None:
    """A shipped name, or a path: what holds a slash or ends as such a file does."""
    text = view.value(key)
    is_path = "/" in text or text.endswith(suffixes)
    found = _find(view, key, text) if is_path else None
    if found is not None and found.is_file() and found.suffix in suffixes:
        view.replace(key, str(found))
    elif is_path or text not in shipped:
        beside = _siblings(view, key, text, [f"*{suffix}" for suffix in suffixes]) if is_path else []
        _missing(view, key, kind, shipped, beside)


def _base(view: View, key: str, text: str) -> None:
    presets = [f"preset:{name}" for name in PRESETS]
    if text.startswith("preset:") and text not in presets:
        _missing(view, key, "preset", presets)
    elif not text.startswith("preset:"):
        _weights(view, key, text, "base model", [SHIPPED_BASE, *presets])


def _tokenizer(view: View, key: str, text: str) -> None:
    if text.startswith("preset:"):
        _refuse(view, key, "a preset has no tokenizer", f"name a hub id, a folder or {SHIPPED_BASE}")
    else:
        _weights(view, key, text, "tokenizer", [SHIPPED_BASE])


def _weights(view: View, key: str, text: str, kind: str, names: list[str]) -> None:
    """A base or a tokenizer: the shipped one, a path, or a hub id."""
    if text == SHIPPED_BASE:
        return
    found = _find(view, key, text, shipped=False)
    is_path = text.startswith(("./", "../", "/", "~")) or text in (".", "..") or text.endswith(CHECKPOINT_FILES)
    if is_path and found is None:
        _missing(view, key, "file or folder", [], _siblings(view, key, text, ("*",)))
    elif is_path and kind == "base model" and _is_other_file(found):
        what = f"'{one_line(text)}' is a file, a folder or a checkpoint file is needed"
        _refuse(view, key, what, f"name the model's folder, or a file that ends in {', '.join(CHECKPOINT_FILES)}")
    elif found is not None and (is_path or found.is_dir()):
        view.replace(key, str(found))
    elif not _HUB_ID.fullmatch(text) or len(text) > _HUB_ID_LENGTH or ".." in text or "--" in text:
        near = nearest(text[:100], names)
        shipped = SHIPPED_BASE + (", preset:NAME (llama-ft models lists them)" if len(names) > 1 else "")
        others = f"a hub id is org/name, a path starts with ./; or {shipped}"
        _refuse(view, key, f"no such {kind} '{one_line(text)}'", f"did you mean '{near}'?" if near else others)


def _is_other_file(found: Path | None) -> bool:
    return found is not None and found.is_file() and found.suffix not in CHECKPOINT_FILES


def _launch(view: View) -> Launcher | None:
    try:
        text = view.value("launch")
    except Unknown:
        return None
    found = _find(view, "launch", text)
    if found is None or not found.is_file():
        shipped = (shipped_root() / "accelerate_configs").glob("*.yaml")
        names = [f"accelerate_configs/{path.name}" for path in shipped]
        _missing(view, "launch", "launch config", names, _siblings(view, "launch", text, ("*.yaml",)))
        return None
    view.replace("launch", str(found))
    launcher = read_launcher(found)
    if isinstance(launcher, Launcher):
        return launcher
    for problem in launcher:
        place = f", line {problem.where.split(':')[-2]}" if problem.where else ""
        view.wrong("launch", f"{found.name}{place}: {problem.what}", problem.hint, of_value=True)
    view.shaped.bad.add("launch")
    return None
