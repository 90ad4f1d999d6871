"""The commands. Each is a thin call into one folder; heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llama_ft.data.filter_verb import filter_text
from llama_ft.data.vocabulary.verb import tokenizer
from llama_ft.errors import user_facing
from llama_ft.evaluate.compare_verb import compare
from llama_ft.evaluate.sweep_verb import sweep
from llama_ft.evaluate.verb import evaluate
from llama_ft.export.verb import export
from llama_ft.launch.verb import launch
from llama_ft.plan.verb import plan
from llama_ft.serve.chat_verb import chat
from llama_ft.serve.serve_verb import serve

app = typer.Typer(
    name="llama-ft",
    help="One-page recipes that tune a LLaMA and prove what they export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. training.learning_rate=1e-4.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def recipes(debug: Debug = False) -> None:
    """List the shipped recipes."""
    with user_facing(debug=debug):
        from llama_ft.recipe.commands import print_catalog

        print_catalog()


@app.command()
def validate(
    args: Annotated[list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes, then overrides.")],
    debug: Debug = False,
) -> None:
    """Report every mistake of one or more recipes at once; exit 0 or 2."""
    with user_facing(debug=debug):
        from llama_ft.recipe.commands import validate_recipes

        validate_recipes(args)


@app.command()
def show(recipe: RecipeArg, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print the resolved recipe, each value with where it came from."""
    with user_facing(debug=debug):
        from llama_ft.recipe.commands import print_resolved

        print_resolved(recipe, overrides or [])


@app.command()
def diff(
    recipe_a: Annotated[str, typer.Argument(metavar="A", help="A recipe, a run folder, or a run.lock.json.")],
    recipe_b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 if they differ, as git diff does.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two resolved recipes key by key, each value with where it came from."""
    with user_facing(debug=debug):
        from llama_ft.recipe.diff import print_diff

        if print_diff(recipe_a, recipe_b, as_json=as_json) and exit_code:
            raise SystemExit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from llama_ft.recipe.commands import print_schema

    print_schema()


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout, memory in bytes.")] = False,
    debug: Debug = False,
) -> None:
    """List the shapes that preset:NAME takes: sizes, context, RoPE, memory by type."""
    with user_facing(debug=debug):
        from llama_ft.llama.catalog import print_models

        print_models(as_json=as_json)


@app.command()
def preview(
    recipe: RecipeArg,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents to show.", show_default="5; all as JSON")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per document on stdout, no more.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one HTML page instead, to open in a browser.")] = None,
    debug: Debug = False,
) -> None:
    """Show what the model will see: tokens coloured by loss, and dropped rows with reasons."""
    with user_facing(debug=debug):
        from llama_ft.data.preview import preview_recipe

        preview_recipe(recipe, overrides or [], limit=limit, as_json=as_json, html=html)


data = typer.Typer(help="Prepare, look over, clean and filter data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command()
def prepare(
    recipe: RecipeArg,
    overrides: Overrides = None,
    allow: Annotated[list[str] | None, typer.Option(help="Accept a preflight fault by name.")] = None,
    debug: Debug = False,
) -> None:
    """Render, tokenise and check a recipe's data now; training then opens it from the cache."""
    with user_facing(debug=debug):
        from llama_ft.data.commands import prepare_recipe

        prepare_recipe(recipe, overrides or [], allow=allow or [])


@data.command(name="table")
def table(
    sources: Annotated[list[str], typer.Argument(metavar="FILE_OR_CARD...", help="Files, folders, or cards' names.")],
    template: Annotated[str | None, typer.Option(help="Template.", show_default="one that takes the layout")] = None,
    tokenizer: Annotated[str, typer.Option(help="A hub id, a folder or smollm2-135m.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=8, help="Longest document, in tokens.")] = 2048,
    debug: Debug = False,
) -> None:
    """Tell what sets hold: layout, rows in, kept, dropped by reason, tokens, labelled share."""
    with user_facing(debug=debug):
        from llama_ft.data.commands import print_data_table

        print_data_table(sources, template=template, tokenizer=tokenizer, max_length=max_length)


@data.command()
def clean(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help="ShareGPT or messages rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .jsonl to write.")],
    language: Annotated[list[str] | None, typer.Option(help="Keep these languages (en, zh, …).")] = None,
    any_language: Annotated[bool, typer.Option("--any-language", help="Keep every language.")] = False,
    html: Annotated[bool, typer.Option(help="Turn HTML into markdown.")] = True,
    dedupe: Annotated[bool, typer.Option(help="Drop conversations that were seen before.")] = True,
    max_tokens: Annotated[int | None, typer.Option(min=8, help="Split longer conversations at turn borders.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Whose tokens --max-tokens counts.")] = None,
    template: Annotated[str, typer.Option(help="In whose form they are counted.")] = "vicuna_v1.1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    debug: Debug = False,
) -> None:
    """Clean logs of conversations as Vicuna's authors did; every step is counted."""
    with user_facing(debug=debug):
        from llama_ft.data.commands import clean_sources

        clean_sources(
            sources,
            output,
            languages=None if any_language else tuple(language or ("en",)),
            html=html,
            dedupe=dedupe,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            template=template,
            overwrite=overwrite,
        )


data.command(name="filter")(filter_text)


app.add_typer(tokenizer, name="tokenizer")

app.command()(plan)


@app.command()
def train(
    recipe: RecipeArg,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of the same name.")] = False,
    allow: Annotated[list[str] | None, typer.Option(help="Accept a preflight fault by name.")] = None,
    machine_rank: Annotated[
        int | None, typer.Option(help="Number of this machine, from 0.", envvar="MACHINE_RANK")
    ] = None,
    main_process_ip: Annotated[
        str | None, typer.Option(help="Address of machine 0, for all machines.", envvar="MAIN_PROCESS_IP")
    ] = None,
    main_process_port: Annotated[
        int | None, typer.Option(help="A free port of machine 0.", envvar="MAIN_PROCESS_PORT")
    ] = None,
    num_machines: Annotated[int | None, typer.Option(help="How many machines train.", envvar="NUM_MACHINES")] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="Processes of all machines together.", envvar="NUM_PROCESSES")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train, merge and prove: `accelerate launch … -m llama_ft.train` with the recipe's launch config."""
    with user_facing(debug=debug):
        from llama_ft.train.launch import Machines, launch

        flags = [*(["--resume"] if resume else []), *(["--overwrite"] if overwrite else [])]
        flags += [flag for name in allow or [] for flag in ("--allow", name)] + (["--debug"] if debug else [])
        machines = Machines(machine_rank, main_process_ip, main_process_port, num_machines, num_processes)
        raise SystemExit(launch(recipe, overrides or [], flags, machines))


app.command()(launch)


@app.command()
def rerun(
    lock: Annotated[Path, typer.Argument(metavar="RUN.LOCK.JSON", help="The lock of a run, or its folder.")],
    overrides: Overrides = None,
    output_dir: Annotated[str | None, typer.Option(help="Where to.", show_default="RUN-rerun, beside RUN")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="changed-data, or a preflight fault.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier rerun.")] = False,
    debug: Debug = False,
) -> None:
    """Train a run once more from its lock, say what changed since, and compare the losses."""
    with user_facing(debug=debug):
        from llama_ft.train.rerun import rerun as train_again

        flags = [*(["--overwrite"] if overwrite else []), *(["--debug"] if debug else [])]
        raise SystemExit(train_again(lock, overrides or [], output_dir=output_dir, allow=allow or [], flags=flags))


app.command()(sweep)


app.command()(compare)


app.command()(export)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], debug: Debug = False) -> None:
    """Write a run's report.html from what lies in its folder; at any time, also while it trains."""
    with user_facing(debug=debug):
        from llama_ft.train.page.write import report_run

        report_run(run)


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint's file or folder, or a hub id.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder, in Hugging Face's layout.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="as stored; float32 if quantised")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder of that name.")] = False,
    debug: Debug = False,
) -> None:
    """Convert Meta's, llama2.c's, GGUF or HF weights, checked tensor by tensor, to Hugging Face's layout."""
    with user_facing(debug=debug):
        from llama_ft.llama.checkpoints.door import import_named

        import_named(source, dest, dtype=dtype, overwrite=overwrite)


app.command()(chat)


app.command()(serve)


app.command(name="eval")(evaluate)


def main() -> None:
    """Entry point of `llama-ft`. Ctrl-C outside of a training run ends quietly with 130."""
    try:
        app()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
