"""The ledger of reproductions: what each recipe claims, what was published, what we measured; nothing without a source.

    python -m llama_ft.evaluate.ledger            # writes docs/reproductions.md
    python -m llama_ft.evaluate.ledger --check    # exit 1 where the page is not what the files say

One file per recipe, `reproductions/FAMILY/NAME.yaml` beside `recipes/FAMILY/NAME.yaml`. What is reproduced, its source
and the deviations stand in the recipe and are taken from there.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_ft.errors import Problem, UserError, user_facing
from llama_ft.files import write_text
from llama_ft.paths import shipped_root
from llama_ft.recipe.nodes import Findings, Source, plain
from llama_ft.recipe.yaml_reader import read_file

Text = Annotated[str, Field(min_length=1)]
Link = Annotated[str, Field(pattern=r"^https://\S+$")]


class Strict(BaseModel):
    """No key that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(Strict):
    """A figure of others. `note`: what stands between it and a run of the recipe, a judge's version for example."""

    what: Text
    value: Text
    source: Link
    note: Text | None = None


class Measured(Strict):
    """A figure of ours. `commit`: the one that brought the figure; `evidence`: a file of this repository that holds it.

    deviations: of this run, beside the recipe's own.
    """

    what: Text
    value: Text
    command: Text
    seed: int
    hardware: Text
    date: datetime.date
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    evidence: Text
    deviations: list[Text] = []


class Needs(Strict):
    """What the run of the recipe as it stands takes, as `llama-ft plan RECIPE --hardware HARDWARE` has it; in hours."""

    hardware: Text
    hours: Annotated[float, Field(gt=0)]


class Entry(Strict):
    """One file of the ledger. `needs` of a recipe that was not run as it stands, be parts of it measured or not."""

    published: list[Published] = []
    measured: list[Measured] = []
    needs: Needs | None = None
    note: Text | None = None


def ledger_folder() -> Path:
    """`reproductions/` of the checkout; UserError outside of one, for it is not shipped with the package."""
    folder = shipped_root() / "reproductions"
    if not folder.is_dir():
        raise UserError("the ledger's files are in a checkout, not in an installed package", where=str(folder))
    return folder


def read_ledger(folder: Path) -> dict[str, Entry]:
    """The entries by recipe (`alpaca/llama-7b-full`). UserError with every mistake of every file."""
    found: dict[str, Entry] = {}
    problems: list[Problem] = []
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        findings = Findings()
        tree = read_file(path, Source(str(path), 0, path.parent), findings)
        problems += findings.problems()
        if tree is None:
            continue
        try:
            found[name] = entry = Entry.model_validate(plain(tree))
        except ValidationError as error:
            problems += [_problem(path, detail) for detail in error.errors()]
            continue
        if not entry.measured and entry.needs is None:
            what = "neither a figure of ours nor what a run would need"
            problems.append(Problem(what, str(path), "needs", "llama-ft plan RECIPE --hardware 8xH100-80GB tells"))
        for (what, command), times in Counter((one.what, one.command) for one in entry.measured).items():
            if times > 1:
                said = f"'{what}' stands here {times} times, by the same command {command.splitlines()[-1]!r}"
                problems.append(Problem(said, str(path), "measured", "leave one"))
        for one in entry.measured:
            if not (folder.parent / one.evidence.partition("#")[0]).is_file():
                problems.append(
                    Problem(f"there is no {one.evidence}", str(path), "evidence", "a file of the repository")
                )
    if problems:
        raise UserError(problems)
    return found


def _problem(path: Path, detail: Any) -> Problem:
    key = ".".join(str(part) for part in detail["loc"])
    return Problem(detail["msg"][:1].lower() + detail["msg"][1:], str(path), key or None)


def page() -> str:
    """docs/reproductions.md. UserError for a file that is wrong, or a recipe and a ledger that do not fit together."""
    from llama_ft.evaluate.ledger_page import whole_page
    from llama_ft.recipe import load_recipe
    from llama_ft.recipe.extends import shipped_recipes

    folder = ledger_folder()
    entries, shipped = read_ledger(folder), shipped_recipes()
    problems = [
        Problem("there is no such recipe", str(folder / f"{name}.yaml"), None, "name the file as the recipe's")
        for name in entries
        if name not in shipped
    ]
    recipes = {name: load_recipe(path, look_up=False) for name, path in shipped.items()}
    problems += [
        Problem(f"{name} says what it reproduces and has no entry in the ledger", str(folder / f"{name}.yaml"))
        for name, recipe in recipes.items()
        if recipe.reproduces is not None and name not in entries
    ]
    if problems:
        raise UserError(problems)
    return whole_page({name: (recipes[name], entries[name]) for name in shipped if name in entries})


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="llama_ft.evaluate.ledger", description="Writes docs/reproductions.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of step")
    check = parser.parse_args().check
    with user_facing():
        text, target = page(), ledger_folder().parent / "docs" / "reproductions.md"
        if not check:
            write_text(target, text)
        elif not target.is_file() or target.read_text(encoding="utf-8") != text:
            print(f"{target} is out of step: python -m llama_ft.evaluate.ledger", file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
