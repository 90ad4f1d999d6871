"""Whether a run was trained on what it is now asked: each suite's prompts against the run's training rows.

The measure is that which keeps benchmarks out of training rows (llama_ft/data/overlap.py): a prompt is in a row that
covers more than half of its words by runs of 8, and more than 0.8 of a short one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llama_ft.data.layouts import read_example
from llama_ft.data.overlap import OverlapIndex
from llama_ft.data.problems import Problems
from llama_ft.errors import UserError

if TYPE_CHECKING:
    from llama_ft.data.prepare import Prepared

SHOWN = 5
"""Leaks that are told of by name."""
ROWS = 1000
"""Training rows between two words on the progress."""


def find_leaks(
    prompts: Mapping[str, str], prepared: Prepared, tick: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """What of `prompts` (id -> text) the training rows hold, as SuiteResult.leaks keeps it.

    {"prompts": those with a word to look for, "rows": training rows that were read, "leaked": how many prompts one of
    them holds, "ids": which, "where": the first few as {"id", "row": `file, row N`, "share" of the prompt's words}}.
    Rows that were held out, or dropped as copies, are not training rows. `sampled` says that a streamed run's first
    rows alone were read; where rows cannot be read any more there is `unknown`, the reason, and no count.
    """
    index = OverlapIndex()
    for name, text in prompts.items():
        index.add(text, name)
    found: dict[str, dict[str, Any]] = {}
    rows = 0
    try:
        for where, said in training_texts(prepared):
            for name, share in index.find_all(said):
                if share > found.get(name, {"share": 0.0})["share"]:
                    found[name] = {"id": name, "row": where, "share": round(share, 3)}
            rows += 1
            if rows % ROWS == 0:
                tick(rows)
    except UserError as error:
        return {"prompts": len(index), "unknown": str(error.problems[0])}
    leaks = {"prompts": len(index), "rows": rows, "leaked": len(found)}
    worst = sorted(found.values(), key=lambda one: (-one["share"], one["id"]))
    return {
        **leaks,
        "ids": sorted(found),
        "where": worst[:SHOWN],
        **({"sampled": True} if prepared.stream is not None else {}),
    }


def training_texts(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """(place, what is said) of every row that was trained on. UserError for rows that cannot be read."""
    held: set[tuple[int, int]] = set()
    if prepared.eval is not None and not isinstance(prepared.job.evaluation, list):
        held = set(zip(prepared.eval["source"], prepared.eval["row"], strict=True))
    aside = {(source, row) for source, row, _ in prepared.set_aside}
    for number, source in enumerate(prepared.job.train):
        problems = Problems()
        for row, value in source.rows(problems):
            if (number, row) in held or (number, row) in aside:
                continue
            example = read_example(value, source.layout, source.columns, source.where(row), problems)
            if example is not None and example.dropped is None and example.said:
                yield source.where(row), example.said
        problems.raise_if_any()


def leaks_said(leaks: Mapping[str, Any]) -> str:
    """A result's leaks in a few words; empty where there is nothing to say."""
    if not leaks:
        return ""
    if "unknown" in leaks:
        return f"not known: {leaks['unknown']}"
    of = f"of {leaks['prompts']:,} prompts in {leaks['rows']:,} training rows"
    sampled = " (the first of a stream)" if leaks.get("sampled") else ""
    return f"{leaks['leaked']:,} {of}{sampled}"
