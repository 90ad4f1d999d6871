"""The signature of `llama-ft chat`; what it needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llama_ft.errors import user_facing


def chat(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or a base name.")],
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="A second model, beside the first on the page.")
    ] = None,
    once: Annotated[str | None, typer.Option(help="Answer one question and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    web: Annotated[bool, typer.Option("--web", help="Talk on a page in the browser.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="On the page: a run beside its base.")] = False,
    host: Annotated[str, typer.Option(help="Where the page is; beyond this machine it asks a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 takes a free one.")] = 7860,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Talk to a run or a model, in the terminal or on a page."""
    sampling: Any = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    with user_facing(debug=debug):
        if web or compare or other:
            from llama_ft.serve.web.server import serve_page

            page: Any = {"web": web, "compare": compare, "host": host, "port": port, "once": once}
            serve_page(source, other, system=system, **page, **sampling)
        else:
            from llama_ft.serve.chat import chat as start_chat

            start_chat(source, once=once, system=system, **sampling)
