"""docs/reproductions.md from the ledger's entries: an overview of all, then family by family what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from llama_ft.evaluate.ledger import Entry, Measured
from llama_ft.recipe.schema import Recipe

HEAD = """# Reproductions

Made by `python -m llama_ft.evaluate.ledger` from [reproductions](../reproductions): change the files there, not this
page.

What each recipe claims to reproduce, what its originals published, and what we measured, with the command that did it.
A recipe that was not run says so, with what its run would take. No figure stands here without its source: of others a
link, of ours a command, a seed, a machine, a date, a commit and the file that holds it. What came out worse is shown
too.

- **Published** figures of judged chat (AlpacaEval, MT-bench) are of the judge of their day: another version of it moves
  them by points, so they are bands to fall into and no digits to hit.
- **Laptop twins** walk the same path on SmolLM2-135M: they show that the path works; no published score applies to
  them.
- **Hours** are those of `llama-ft plan RECIPE --hardware …`: a calculation which no run of ours on such hardware has
  checked. They are for the recipe as it stands, of several stages for its own alone, checkpoints and export included.

"""
NOT_RUN = "not yet run"
SHOWN = 2
"""Figures of ours that the overview has of a recipe."""


def whole_page(ledger: Mapping[str, tuple[Recipe, Entry]]) -> str:
    """The page's text; recipes in the order given, families by the folder before the first slash."""
    return HEAD + "\n".join([*overview(ledger), "", *families(ledger)]).rstrip() + "\n"


def overview(ledger: Mapping[str, tuple[Recipe, Entry]]) -> Iterator[str]:
    """A table of all recipes: what, published, ours."""
    measured = sum(bool(entry.measured) for _, entry in ledger.values())
    yield f"{len(ledger)} recipes, {measured} of them with figures of ours."
    yield ""
    yield "| recipe | reproduces | published | ours |"
    yield "|---|---|---|---|"
    for name, (recipe, entry) in ledger.items():
        what = recipe.reproduces.what if recipe.reproduces else "nothing: a start of your own"
        published = "; ".join(f"{one.what} {one.value}" for one in entry.published) or "–"
        yield f"| [`{name}`](#{anchor(name)}) | {cell(what)} | {cell(published)} | {cell(ours(entry))} |"


def ours(entry: Entry) -> str:
    """What the overview says of our side."""
    parts = [f"{one.what} {one.value}" for one in entry.measured]
    if not parts:
        return f"{NOT_RUN}: {needed(entry)}"
    shown = [*parts[:SHOWN], *([f"{len(parts) - SHOWN} more below"] if len(parts) > SHOWN else [])]
    return "; ".join(shown) + (f"; as it stands {NOT_RUN}" if entry.needs is not None else "")


def needed(entry: Entry) -> str:
    """`needs 4 × H100-80GB for 0.7 hours`."""
    assert entry.needs is not None  # of an entry without figures, which was read
    count, cross, device = entry.needs.hardware.partition("x")
    hardware = f"{count} × {device}" if cross and count.isdigit() else entry.needs.hardware
    return f"needs {hardware} for {entry.needs.hours:g} {'hour' if entry.needs.hours == 1 else 'hours'}"


def families(ledger: Mapping[str, tuple[Recipe, Entry]]) -> Iterator[str]:
    """Recipe by recipe, below the name of its family."""
    for family, names in groupby(ledger, key=lambda name: name.partition("/")[0]):
        yield f"## {family}"
        yield ""
        for name in names:
            yield from details(name, *ledger[name])


def details(name: str, recipe: Recipe, entry: Entry) -> Iterator[str]:
    """One recipe: sources, figures, deviations."""
    claim = recipe.reproduces
    yield f"### {name}"
    yield ""
    source = f", after <{claim.source}>" if claim and claim.source else ""
    yield f"[The recipe](../recipes/{name}.yaml): {claim.what if claim else 'reproduces nothing'}{source}."
    yield ""
    for one in entry.published:
        note = f"; {one.note}" if one.note else ""
        yield f"- Published: {one.what} **{one.value}** ([source]({one.source})){note}."
    for figure in entry.measured:
        yield from of_ours(figure)
    if entry.needs is not None:
        as_it_stands = " as it stands" if entry.measured else ""
        yield f"- {NOT_RUN.capitalize()}{as_it_stands}: {needed(entry)}."
    if entry.note:
        yield f"- {entry.note}"
    if claim and claim.deviations:
        yield "- The recipe's deviations: " + "; ".join(claim.deviations) + "."
    yield ""


def of_ours(one: Measured) -> Iterator[str]:
    """A figure of ours, with all that it takes to get it again."""
    yield f"- Ours: {one.what} **{one.value}**; seed {one.seed}, {one.hardware}, {one.date}, commit `{one.commit}`,"
    yield f"  [evidence](../{one.evidence})."
    if one.deviations:
        yield f"  This run: {'; '.join(one.deviations)}."
    yield ""
    yield from (f"      {line}" for line in one.command.strip().splitlines())
    yield ""


def anchor(name: str) -> str:
    """The anchor that a heading gets: lower case, without dots and slashes."""
    return "".join(sign for sign in name.lower() if sign.isalnum() or sign in "-_")


def cell(text: str) -> str:
    """Text in a table's cell, which ends with its line."""
    return " ".join(text.split()).replace("|", "\\|")
