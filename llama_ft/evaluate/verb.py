"""The signature of `llama-ft eval`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import Problem, UserError, user_facing
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
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer of suite chat.", show_default="1024")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODEL_OR_FOLDER", help="Of suite chat: an endpoint's model, or a reward model."),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the judge's endpoint.", show_default="OPENAI_BASE_URL")
    ] = None,
    judge_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts in FastChat's format.", show_default="our own")
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Judge pairs with the base's answers, in both orders.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Other answers for --pairs.", show_default="the base's")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of suite academic: names of lm-eval, NAME=FILE or YAML files; commas between.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask these in the chat template.")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(help="Of suites positions and passkey: tokens, commas between.", show_default="its context"),
    ] = None,
    rope: Annotated[
        str | None,
        typer.Option(metavar="YAML", help="For a model by itself: RoPE scaling.", show_default="its own"),
    ] = None,
    infilling_tokens: Annotated[
        str | None, typer.Option(help="Of suite infilling: four, commas between.", show_default="the recipe's")
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
            from llama_ft.evaluate.chat.judges import Judging
            from llama_ft.evaluate.rope import read_rope
            from llama_ft.evaluate.run import Asked, evaluate_source

        names = [name.strip() for name in suite.split(",") if name.strip()]
        who = [name.strip() for name in subjects.split(",") if name.strip()] if subjects is not None else None
        asked = {"--judge-url": judge_url, "--judge-prompts": judge_prompts, "--pairs": pairs, "--against": against}
        if judge is None and any(asked.values()):
            problems = [Problem("there is no judge", key=key, hint="--judge") for key, value in asked.items() if value]
            raise UserError(problems)
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
                max_tokens=max_tokens,
                judging=None if judge is None else Judging(judge, judge_url, judge_prompts, pairs, against),
                apply_chat_template=apply_chat_template,
                lengths=_lengths(lengths),
                rope=read_rope(rope) if rope is not None else None,
                infilling_tokens=_tokens(infilling_tokens),
                out=out,
                overwrite=overwrite,
            )
        )


def _lengths(said: str | None) -> list[int]:
    """Tokens, each length once and rising. UserError for what is no whole number from 16 on."""
    parts = [part.strip().replace("_", "") for part in (said or "").split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= 16)]
    if wrong or (said is not None and not parts):
        what = f"'{wrong[0]}' is no number of tokens" if wrong else "no length was named"
        raise UserError(what, key="--lengths", hint="whole numbers from 16 on: --lengths 1024,2048,4096")
    return sorted({int(part) for part in parts})


def _tokens(said: str | None) -> list[str] | None:
    """Four names. UserError for another number of them."""
    if said is None:
        return None
    names = [name.strip() for name in said.split(",")]
    if len(names) != 4 or not all(names):
        hint = "before prefix, before suffix, before middle, at the end: --infilling-tokens A,B,C,D"
        what = f"infilling needs four tokens, found {len([name for name in names if name])}"
        raise UserError(what, key="--infilling-tokens", hint=hint)
    return names
