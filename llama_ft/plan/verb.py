"""The signature of `llama-ft plan`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import user_facing


def plan(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.learning_rate=1e-4.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="8xH100-80GB, 4090, 24GiB, cpu.", show_default="this one; without a recipe 2048xA100-80GB"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout; bytes, seconds.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="A table of methods and cards for the recipe's base.")] = False,
    price: Annotated[float | None, typer.Option(help="Of one device and hour, in any currency.")] = None,
    compute: Annotated[str | None, typer.Option(help="No recipe: FLOP of a model's training, 1e21.")] = None,
    tokens: Annotated[str | None, typer.Option(help="No recipe: tokens of training, 1.4T.")] = None,
    params: Annotated[str | None, typer.Option(help="No recipe: parameters, 7B.")] = None,
    served: Annotated[str | None, typer.Option(help="Tokens served over that model's life, 2T.")] = None,
    utilisation: Annotated[
        str | None, typer.Option(help="Share of the card's dense bfloat16 rate.", show_default="0.47")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Loss against compute as a picture: .png, .svg, .pdf.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Tell what a run will take, before it costs anything: tokens, steps, memory, time, disk, price, launch line.

    Without a recipe: how large a model for so much compute, how many tokens, how many GPU-hours.
    """
    with user_facing(debug=debug):
        from llama_ft.plan.commands import plan_asked

        asked = {"compute": compute, "tokens": tokens, "params": params, "served": served, "utilisation": utilisation}
        plan_asked(
            recipe,
            overrides or [],
            question=asked,
            hardware=hardware,
            price=price,
            as_json_text=as_json,
            sweeping=sweep,
            chart=chart,
        )
