"""The signature of `llama-ft compare`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...", help="Run folders, the folder of a sweep, or of a model that was evaluated."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Write one HTML page instead, to open in a browser.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Put runs side by side: what their recipes change, losses, evaluations, answers."""
    with user_facing(debug=debug):
        from llama_ft.evaluate.compare import print_comparison

        print_comparison(runs, html)
