"""Names and paths in a recipe: found and made absolute, or reported with the nearest name that exists.

A path in a recipe file is looked up beside that file (the parent's own folder, if a parent wrote it), in the working
directory, then among the shipped files; a path in an override starts from the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llama_ft.errors import did_you_mean
from llama_ft.paths import PACKAGE, find_file, shipped_root
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.recipe.schema import PRESETS
from llama_ft.recipe.view import Unknown, View
from llama_ft.recipe.words import one_line

SHIPPED_BASE = "smollm2-135m"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")
_TEMPLATES = PACKAGE / "data" / "templates"


def resolve_names(view: View) -> Launcher | None:
    """Looks every name and path up, in place. Returns the launch config where it can be read.

    What is not found goes to the findings of `view`; nothing is raised.
    """
    for key in view.sources():
        _attempt(_data_path, view, f"{key}.path")
        _attempt(_card, view, f"{key}.use")
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


def _attempt(look, view: View, key: str) -> None:
    try:
        text = view.value(key)
    except Unknown:
        return
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


def _missing(view: View, key: str, what: str, text: str, names: list[str], kind: str, hint: str = "") -> None:
    text = text[:100]
    if names:
        hint = did_you_mean(text, names, kind=kind)
    view.wrong(key, f"{what} '{one_line(text)}'", hint or None, of_value=True)
    view.shaped.bad.add(key)


def _data_path(view: View, key: str, text: str) -> None:
    found = _find(view, key, text)
    if found is not None and found.is_file():
        view.replace(key, str(found))
    elif found is not None:
        _missing(view, key, "a file of rows is needed, this is a folder:", text, [], "")
    else:
        names = _siblings(view, key, text, ("*.json", "*.jsonl"))
        start = "the working directory" if view.mark(key).line == 0 else "the recipe's folder and the working directory"
        _missing(view, key, "no such file", text, names, "files there", f"looked in {start}")


def _card(view: View, key: str, text: str) -> None:
    if "/" not in text and not text.endswith((".yaml", ".yml")):
        if text not in shipped_cards():
            _missing(view, key, "no such card", text, shipped_cards(), "cards")
        return
    found = _find(view, key, text)
    if found is not None and found.is_file():
        view.replace(key, str(found))
    else:
        names = [*_siblings(view, key, text, ("*.yaml",)), *shipped_cards()]
        _missing(view, key, "no such card", text, names, "cards")


def _template(view: View, key: str, text: str) -> None:
    if "/" not in text and not text.endswith(".jinja"):
        if text not in shipped_templates():
            _missing(view, key, "no such template", text, shipped_templates(), "templates")
        return
    found = _find(view, key, text)
    if found is not None and found.is_file():
        view.replace(key, str(found))
    else:
        names = [*_siblings(view, key, text, ("*.jinja",)), *shipped_templates()]
        _missing(view, key, "no such template", text, names, "templates")


def _base(view: View, key: str, text: str) -> None:
    if text.startswith("preset:"):
        if text.removeprefix("preset:") not in PRESETS:
            _missing(view, key, "no such preset", text, [f"preset:{name}" for name in PRESETS], "presets")
        return
    _weights(view, key, text, [SHIPPED_BASE, *(f"preset:{name}" for name in PRESETS)])


def _tokenizer(view: View, key: str, text: str) -> None:
    if text.startswith("preset:"):
        view.wrong(key, "a preset has no tokenizer", f"name a hub id, a folder or {SHIPPED_BASE}", of_value=True)
        view.shaped.bad.add(key)
        return
    _weights(view, key, text, [SHIPPED_BASE])


def _weights(view: View, key: str, text: str, names: list[str]) -> None:
    """A base or a tokenizer: the shipped one, a path, or a hub id."""
    if text == SHIPPED_BASE:
        return
    found = _find(view, key, text, shipped=False)
    if text.startswith(("./", "../", "/", "~")) or text in (".", "..") or text.endswith(".gguf"):
        if found is None:
            siblings = _siblings(view, key, text, ("*",))
            _missing(view, key, "no such file or folder", text, siblings, "names there", "the path leads nowhere")
        elif key == "model.base" and found.is_file() and found.suffix != ".gguf":
            _missing(view, key, "a folder or a .gguf file is needed, not", text, [], "")
        else:
            view.replace(key, str(found))
    elif found is not None and found.is_dir():
        view.replace(key, str(found))
    elif not _HUB_ID.fullmatch(text) or len(text) > 96 or ".." in text or "--" in text:
        hint = did_you_mean(text[:100], names)
        if not hint.startswith("did you mean"):
            hint = f"a hub id is org/name, a folder starts with ./, or take one of {', '.join(names)}"
        view.wrong(
            key,
            f"no such {'base model' if key == 'model.base' else 'tokenizer'} '{one_line(text)}'",
            hint,
            of_value=True,
        )
        view.shaped.bad.add(key)


def _launch(view: View) -> Launcher | None:
    try:
        text = view.value("launch")
    except Unknown:
        return None
    found = _find(view, "launch", text)
    if found is None or not found.is_file():
        names = [f"accelerate_configs/{path.name}" for path in (shipped_root() / "accelerate_configs").glob("*.yaml")]
        names += _siblings(view, "launch", text, ("*.yaml",))
        _missing(view, "launch", "no such launch config", text, sorted(set(names)), "launch configs")
        return None
    view.replace("launch", str(found))
    launcher = read_launcher(found)
    if isinstance(launcher, Launcher):
        return launcher
    for problem in launcher:
        place = f"line {problem.where.split(':')[-2]}: " if problem.where else ""
        view.wrong("launch", f"{found.name}: {place}{problem.what}", problem.hint, of_value=True)
    view.shaped.bad.add("launch")
    return None
