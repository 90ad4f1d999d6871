"""`llama-ft data filter`, as the command line declares it; what it does is in `filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing


def filter_text(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Text: files, folders, or cards' names.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl to write.")],
    steps: Annotated[
        str | None, typer.Option(help="Steps, with commas between.", show_default="what suits each source")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Keep these (en, de, …).", show_default="en")] = None,
    similarity: Annotated[float, typer.Option(help="From which Jaccard similarity rows are near copies.")] = 0.8,
    dropped: Annotated[Path | None, typer.Option(help="A .jsonl for the rows left out, with reasons.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="At the most.", show_default="one per core")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Filter raw text by published rules: language, Gopher's, C4's, code's, near copies; every rule is counted.

    Steps: language, gopher-repetition, gopher-quality, c4, code, and duplicates or near-duplicates.
    """
    with user_facing(debug=debug):
        from llama_ft.data.commands import filter_sources

        filter_sources(
            sources,
            output,
            steps=steps,
            languages=tuple(language or ("en",)),
            similarity=similarity,
            dropped=dropped,
            processes=processes,
            overwrite=overwrite,
        )
