"""Where a recipe's rows come from: a card's file, a file named in the recipe, or a data set on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llama_ft.data.cards import Card, Files, Hub, load_card
from llama_ft.data.files import check_file, read_rows, sha256_of, shown
from llama_ft.data.layouts import check_layout
from llama_ft.data.problems import Problems
from llama_ft.errors import Problem, UserError
from llama_ft.recipe.schema import Data
from llama_ft.tokenizer.hub import hub_problem, quick_hub


@dataclass(frozen=True)
class Source:
    """An opened source. `label` names it in messages, `where(row)` a row of it; `fingerprint` changes with its rows."""

    label: str
    layout: str
    fingerprint: str
    columns: Mapping[str, str] | None = None
    system: str | None = None
    limit: int | None = None
    path: Path | None = None
    dataset: Any = field(default=None, repr=False)

    def where(self, row: int) -> str:
        """Names a row of this source in a message."""
        return f"{self.label}, row {row}"

    def rows(self, problems: Problems) -> Iterator[tuple[int, Any]]:
        """Yields (row, value) with 0-based rows, at most `limit`; file problems are added to `problems`."""
        rows = read_rows(self.path, problems) if self.path is not None else enumerate(self.dataset)
        return islice(rows, self.limit)

    def unchanged(self) -> bool:
        """Whether a file still holds what it held when it was opened."""
        return self.path is None or (self.path.exists() and sha256_of(self.path) == self.fingerprint)


def open_sources(entries: list[Data], section: str = "data") -> list[Source]:
    """Opens every entry of `data` (or `eval_data`); raises one :class:`UserError` with the problems of all of them."""
    sources: list[Source] = []
    problems: list[Problem] = []
    for number, entry in enumerate(entries):
        try:
            sources.append(_open(entry, f"{section}.{number}"))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return sources


def _open(entry: Data, key: str) -> Source:
    if entry.weight != 1:
        what = f"found {entry.weight}, only 1.0 is built: sources are joined whole"
        raise UserError(what, key=f"{key}.weight", hint="take fewer rows of a source with limit")
    if entry.use is None and entry.path is None:
        raise UserError("a source needs use (a card) or path (a file)", key=key)
    card = load_card(entry.use, key=f"{key}.use") if entry.use is not None else None
    columns = card.columns if card else None
    layout = check_layout(entry.layout or (card.layout if card else None), columns, key=key)
    if card is None or entry.path is not None:
        return _file(Path(str(entry.path)).expanduser(), f"{key}.path", layout, columns, entry)
    card.check_split(entry.split, key=f"{key}.split")
    if isinstance(card.source, Files):
        return _file(card.file(entry.split), f"{key}.use", layout, columns, entry)
    return _hub(card, card.source, layout, entry, key)


def _file(path: Path, key: str, layout: str, columns: Mapping[str, str] | None, entry: Data) -> Source:
    check_file(path, key=key)
    return Source(
        label=shown(path),
        layout=layout,
        fingerprint=sha256_of(path),
        columns=columns,
        system=entry.system,
        limit=entry.limit,
        path=path,
    )


def _hub(card: Card, hub: Hub, layout: str, entry: Data, key: str) -> Source:
    import datasets

    split = hub.splits[entry.split]
    try:
        with quick_hub():
            rows = datasets.load_dataset(hub.hub, name=hub.config, revision=hub.revision, split=split)
    except Exception as error:  # datasets, huggingface_hub, fsspec and the transport each raise their own
        instead = f"or fetch the rows yourself and add path: FILE beside use: {card.name}"
        raise hub_problem(error, hub.hub, what="data set", key=f"{key}.use", instead=instead) from error
    state = f"{hub.hub}@{hub.revision}/{hub.config}/{split}/{rows._fingerprint}/{len(rows)}"
    return Source(
        label=f"{hub.hub} ({split})",
        layout=layout,
        fingerprint=hashlib.sha256(state.encode()).hexdigest(),
        columns=card.columns,
        system=entry.system,
        limit=entry.limit,
        dataset=rows,
    )
