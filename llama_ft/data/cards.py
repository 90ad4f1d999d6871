"""Cards: what a data set is and where its rows come from, one YAML file each in `datasets/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, PrivateAttr, StrictInt, StrictStr, Tag, ValidationError

from llama_ft.data.python_code import SPLITS, What
from llama_ft.errors import UserError, did_you_mean, nearest
from llama_ft.paths import find_file, shipped_root
from llama_ft.recipe.nodes import Findings, Items, Map, Mark, Node, Source, plain
from llama_ft.recipe.schema import Layout
from llama_ft.recipe.section import Section, Text
from llama_ft.recipe.yaml_reader import read_file


class Files(Section):
    """Rows in files that stand beside the card."""

    files: Annotated[dict[StrictStr, Text], Field(min_length=1)]
    """Split name -> a file, a folder or a pattern, relative to the card."""


class Hub(Section):
    """Rows of a data set on the Hugging Face hub."""

    hub: Text
    """Repository id, owner/name."""
    revision: Text | None = None
    """Commit, tag or branch; null takes the hub's default. What it stands for is recorded as a commit."""
    config: Text | None = None
    """Configuration name, for a repository that has several."""
    splits: Annotated[dict[StrictStr, Text], Field(min_length=1, default_factory=lambda: {"train": "train"})]
    """Split name in a recipe -> split name on the hub."""
    data_files: Annotated[dict[StrictStr, Text], Field(min_length=1)] | None = None
    """Split name on the hub -> its file or pattern in the repository; null lets `datasets` choose, which joins all."""


class Python(Section):
    """Rows made from the standard library of the Python that runs."""

    python: What
    """docstrings: documented functions, as alpaca rows both ways; as text, files: whole modules, long-files: those of
    8,192 tokens or so and more, functions: the code of documented functions, docs: what modules say of themselves,
    reference: that of the language."""


class Tokens(Section):
    """What a row of the train split holds on average, all turns together, without what a template writes around it."""

    prompt: Annotated[float, Field(ge=0)]
    """Tokens of the user's turns, by Llama 2's tokenizer."""
    answer: Annotated[float, Field(ge=0)]
    """Tokens of the assistant's turns."""
    source: Text
    """Where the means come from: a paper's table, or how many of the rows were counted."""


KINDS: dict[str, type[Section]] = {"files": Files, "hub": Hub, "python": Python}
"""What a source can be, by the key that says so."""


def _kind(source: Any) -> str:
    return next((kind for kind in KINDS if isinstance(source, dict) and kind in source), "hub")


class Card(Section):
    """A data set: its layout, its source, its licence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Text
    """The name a recipe uses; the card's file is called the same."""
    title: Text
    """One line for people."""
    layout: Layout | None = None
    """How a raw row is shaped; null guesses it from the first rows and says so."""
    source: Annotated[
        Annotated[Files, Tag("files")] | Annotated[Hub, Tag("hub")] | Annotated[Python, Tag("python")],
        Discriminator(_kind),
    ]
    """Where the rows come from."""
    columns: dict[StrictStr, Text] | None = None
    """Renames: the layout's own key -> the column of this data set."""
    licence: Text | None = None
    """Licence as the publisher states it."""
    homepage: Text | None = None
    """Where the publisher describes it."""
    description: Text | None = None
    """What is in it, in a few sentences."""
    rows: dict[StrictStr, StrictInt] | None = None
    """Rows per split, as published."""
    tokens: Tokens | None = None
    """Mean tokens per row, which `llama-ft plan` estimates with before the rows are fetched."""
    _path: Path = PrivateAttr(default=Path())

    @property
    def splits(self) -> list[str]:
        """Names of the splits a recipe can ask for."""
        if isinstance(self.source, Python):
            return list(SPLITS)
        return list(self.source.files if isinstance(self.source, Files) else self.source.splits)

    def check_split(self, split: str, *, key: str | None = None) -> None:
        """Raises :class:`UserError` for a split that the card does not have."""
        if split not in self.splits:
            what = f"the card '{self.name}' has no split '{split}'"
            raise UserError(what, key=key, hint=did_you_mean(split, self.splits, kind="splits"))

    def file(self, split: str) -> Path:
        """Absolute path of a split's file, folder or pattern; only for a card with files."""
        assert isinstance(self.source, Files)
        named = self._path.parent / Path(self.source.files[split]).expanduser()
        return Path(os.path.abspath(named))  # noqa: PTH100 (resolve() would follow links, and a pattern is no file)


def load_card(use: str, *, key: str | None = None) -> Card:
    """Reads the card that `data[].use` names: a shipped card's name, or the path of a YAML file.

    Raises :class:`UserError` with every mistake of the card at its file:line:column, or with the nearest card's name.
    """
    path = _find(use)
    if path is None:
        names = sorted(entry.stem for entry in (shipped_root() / "datasets").glob("*.yaml"))
        raise UserError(f"no such card '{use}'", key=key, hint=did_you_mean(use, names, kind="cards"))
    findings = Findings()
    source = Source(str(path), 0, path.parent)
    tree = read_file(path, source, findings)
    findings.raise_if_any()
    assert tree is not None
    try:
        card = Card.model_validate(plain(tree))
    except ValidationError as error:
        for detail in error.errors():
            _note(tree, detail, findings)
        findings.raise_if_any()
        raise
    card._path = path
    return card


def _find(use: str) -> Path | None:
    if Path(use).suffix in (".yaml", ".yml"):
        return find_file(use)
    shipped = shipped_root() / "datasets" / f"{use}.yaml"
    return shipped if shipped.is_file() else None


def _note(tree: Map, detail: Any, findings: Findings) -> None:
    """One pydantic error as a problem at the place of its key."""
    loc = [str(part) for part in detail["loc"] if part not in ("[key]",)]
    if len(loc) > 1 and loc[0] == "source" and loc[1] in KINDS:
        del loc[1]  # the union's tag, not a key
    mark, depth = _mark(tree, loc)
    name = ".".join(loc)
    kind = detail["type"]
    if kind == "extra_forbidden":
        inside = depth > 1 and loc[0] == "source"
        keys = [key for kind in KINDS.values() for key in kind.model_fields]
        valid = keys if inside else list(Card.model_fields)
        match = nearest(loc[-1], valid)
        hint = f"did you mean '{match}'?" if match else f"keys here: {', '.join(valid)}"
        findings.add(mark, "unknown key", key=name, hint=hint)
    elif kind == "missing":
        findings.add(mark, "is missing", key=name, hint="every card needs it")
    else:
        hint = f"expected: {detail['msg']}"
        if kind == "literal_error":
            hint = f"expected one of {detail['ctx']['expected']}"
        findings.add(mark, "has the wrong value", key=name, hint=hint)


def _mark(node: Node, loc: list[str]) -> tuple[Mark, int]:
    """The deepest place that a location path reaches, and how many keys deep the path is."""
    mark = node.mark
    for part in loc:
        if isinstance(node, Map) and part in node.entries:
            mark, node = node.entries[part].mark, node.entries[part].node
        elif isinstance(node, Items) and part.isdigit() and int(part) < len(node.items):
            node = node.items[int(part)]
            mark = node.mark
        else:
            break
    return mark, len(loc)
