"""The signature of `llama-ft eval`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing
from llama_ft.imports import for_good


def evaluate(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or a base name.")],
    suite: Annotated[str, typer.Option(help="What is measured: heldout, quick, …; commas between several.")] = "quick",
    subjects: Annotated[
        str | None, typer.Option(help="Of a run: base, tuned, merged.", show_default="base,tuned")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_CARD", help="Rows to measure on; repeat for several.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Of the rows in --data.", show_default="guessed")] = None,
    template: Annotated[str | None, typer.Option(help="For a model by itself.", show_default="its own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of each part.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of samples, draws and intervals.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each task of suite code, for pass@k.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of these.", show_default="0 for one, 0.8 for more")
    ] = None,
    unsandboxed: Annotated[
        bool, typer.Option("--unsandboxed", help="Run generated code where it cannot be walled in.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Of suite academic: names of lm-eval or YAML files; commas between several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a model's results.", show_default="runs/eval-NAME")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what is there already.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure a run beside its base, or a model: scores with intervals, in eval/*.json and eval.html."""
    with user_facing(debug=debug):
        with for_good():
            from llama_ft.evaluate.run import Asked, evaluate_source

        names = [name.strip() for name in suite.split(",") if name.strip()]
        who = [name.strip() for name in subjects.split(",") if name.strip()] if subjects is not None else None
        evaluate_source(
            Asked(
                source,
                names,
                subjects=who,
                data=list(data or []),
                layout=layout,
                template=template,
                limit=limit,
                seed=seed,
                samples=samples,
                temperature=temperature,
                unsandboxed=unsandboxed,
                tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
                out=out,
                overwrite=overwrite,
            )
        )
