"""The signature of `llama-ft launch`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing


def launch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.learning_rate=1e-4.")
    ] = None,
    on: Annotated[str, typer.Option(help="slurm, skypilot or kubernetes.")] = "slurm",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines.", show_default="as the launch config says")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs of each node.", show_default="as --hardware or the launch config says"),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="The card, and how many a node has: 8xH100-80GB.", show_default="not named")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where runs lie: a volume (SkyPilot), s3://…, gs://… (SkyPilot), a claim (Kubernetes).",
            show_default="llama-ft",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="An image with llama_ft inside (Kubernetes).", show_default="llama-ft")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN.sbatch, .sky.yaml, .trainjob.yaml")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file, or write it to --out; no more.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a recipe on a cluster: its plan fills an sbatch file, a SkyPilot task or a Kubeflow TrainJob."""
    with user_facing(debug=debug):
        from llama_ft.launch.commands import launch_recipe

        status = launch_recipe(
            recipe,
            overrides or [],
            on=on,
            nodes=nodes,
            gpus=gpus,
            hardware=hardware,
            storage=storage,
            image=image,
            out=out,
            dry_run=dry_run,
        )
        raise SystemExit(status)
