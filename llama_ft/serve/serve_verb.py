"""The signature of `llama-ft serve`; what it needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llama_ft.errors import user_facing


def serve(
    sources: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Runs, model folders or base names.")],
    engine: Annotated[str, typer.Option(help="auto, vllm, transformers or llama-cpp.")] = "auto",
    host: Annotated[str, typer.Option(help="Address; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must present; ps shows it.", envvar="LLAMA_FT_API_KEY")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also serve each run's base, as NAME-base.")] = False,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests at once, the waiting counted in.")] = 16,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MB",
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the engine's log, and the traceback of an error.")
    ] = False,
) -> None:
    """Serve runs and models over OpenAI's HTTP API, with an engine that is installed."""
    with user_facing(debug=debug):
        from llama_ft.serve.server import serve as start_server

        limits: Any = {"max_concurrent": max_concurrent, "max_body": max_body}
        where: Any = {"host": host, "port": port, "api_key": api_key}
        start_server(sources, engine=engine, compare=compare, debug=debug, **where, **limits)
