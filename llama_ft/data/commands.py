"""`llama-ft data …`: prepare a recipe's data, tell what sets hold, clean logs of conversations, filter text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from llama_ft.data.prepare import Prepared, inspect_data, prepare_data
from llama_ft.data.show import console, print_report, rows_line
from llama_ft.data.sources import Source, named, open_sources
from llama_ft.recipe import load_recipe
from llama_ft.recipe.schema import Data, Recipe

TABLE_WIDTH = 160
"""Characters of a table's line where there is no terminal to ask."""


def prepare_recipe(path: str, overrides: list[str], *, allow: list[str]) -> None:
    """Prepares a recipe's data into the cache and prints the report. Raises UserError as training would."""
    recipe = load_recipe(path, overrides)
    start = time.perf_counter()
    with rows_line() as progress:
        prepared = prepare_data(recipe, progress=progress, allow=allow)
    print_report(prepared.report, sys.stdout)
    seconds = time.perf_counter() - start
    print(f"{len(prepared.train):,} documents in {prepared.folder} ({seconds:.1f} s)")


def print_data_table(sources: list[str], *, template: str | None, tokenizer: str, max_length: int) -> None:
    """Prints one line per set: layout, rows, kept, dropped by reason, tokens, labelled share.

    Each set is prepared with the objective that its layout is made for. Raises UserError with the problems of the first
    set that cannot be read.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("set", overflow="fold")
    table.add_column("layout", no_wrap=True)
    for name in ("rows", "kept", "tokens", "labelled"):
        table.add_column(name, justify="right")
    table.add_column("dropped, changed, faults", overflow="fold")
    for name in sources:
        entry = named(name)
        (source,) = open_sources([entry])
        prepared = inspect_data(_recipe_for(source, entry, template, tokenizer, max_length))
        table.add_row(*map(Text, _line(name, source, prepared)))
    console(sys.stdout, TABLE_WIDTH).print(table)


def _recipe_for(source: Source, entry: Data, template: str | None, tokenizer: str, max_length: int) -> Recipe:
    objectives = {"preference": "dpo", "rated": "kto", "text": "pretrain"}
    fields: dict[str, Any] = {
        "name": "table",
        "model": {"base": tokenizer, "tokenizer": tokenizer},
        "adapter": {"method": "full"},
        "data": [entry.model_dump()],
        "template": template or ("alpaca" if source.layout == "alpaca" else "chatml"),
        "sequence": {
            "max_length": max_length,
            "overlong": "split" if source.layout == "text" else "drop",
            "max_truncated": 1.0,
        },
        "training": {"objective": objectives.get(source.layout, "sft")},
    }
    return Recipe.model_validate(fields)


def _line(name: str, source: Source, prepared: Prepared) -> list[str]:
    (counts,) = prepared.report.sources
    share = f"{counts.labelled / counts.tokens:.0%}" if counts.tokens else "–"
    said = [f"{number:,} {reason}" for reason, number in counts.dropped.items()]
    said += [f"{number:,} {note}" for note, number in counts.notes.items()]
    said += [f"{counts.duplicates:,} copies"] if counts.duplicates else []
    said += [f"fault {fault.name}: {fault.what}" for fault in prepared.report.faults]
    numbers = [f"{counts.rows:,}", f"{counts.kept:,}", f"{counts.tokens:,}", share]
    return [Path(name).name, source.layout, *numbers, "; ".join(said)]


def clean_sources(sources: list[str], output: Path, **settings: Any) -> None:
    """Runs the cleaning steps and prints what each did."""
    from llama_ft.data.clean import clean_files, print_clean_report

    with rows_line() as progress:
        report = clean_files([Path(name) for name in sources], output, progress=progress, **settings)
    print_clean_report(report, sys.stdout)


def filter_sources(sources: list[str], output: Path, *, steps: str | None, **settings: Any) -> None:
    """Runs quality steps over texts and prints what each did. `steps`: names with commas between them, None for all."""
    from llama_ft.data.filter import filter_files
    from llama_ft.data.filter_report import print_filter_report

    asked = None if steps is None else [name.strip() for name in steps.split(",") if name.strip()]
    with rows_line() as progress:
        report = filter_files([named(name) for name in sources], output, steps=asked, progress=progress, **settings)
    print_filter_report(report, sys.stdout)
