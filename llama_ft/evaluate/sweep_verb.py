"""The signature of `llama-ft sweep`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")],
    grid: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE[,VALUE]...", help="Values to try, e.g. adapter.r=8,16.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the runs.", show_default="runs/NAME-sweep")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points and how they stand; train none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train finished points again.")] = False,
    allow: Annotated[list[str] | None, typer.Option(help="Accept a preflight fault by name.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a recipe once for each combination of values, and rank the runs by held-out loss."""
    with user_facing(debug=debug):
        from llama_ft.evaluate.sweep import run_sweep

        flags = [flag for name in allow or [] for flag in ("--allow", name)] + (["--debug"] if debug else [])
        status = run_sweep(recipe, grid, out=out, dry_run=dry_run, overwrite=overwrite, flags=flags)
        raise SystemExit(status)
