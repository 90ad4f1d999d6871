"""`chat --web`: opens the models, takes the port, and serves the page until Ctrl-C."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llama_ft.errors import MachineFault, UserError
from llama_ft.imports import for_good

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llama_ft.serve.web.page import Page

PASSWORD = "LLAMA_FT_PASSWORD"
SHORTEST_PASSWORD = 8


def serve_page(
    source: str,
    other: str | None = None,
    *,
    web: bool = True,
    compare: bool = False,
    once: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_tokens: int = 512,
    seed: int | None = None,
) -> None:
    """Serves the chat page until it is interrupted.

    source, other: what to talk to; with `compare` a run's base beside the run. host: where to listen; anything but this
    machine's loopback takes a password, from the environment (LLAMA_FT_PASSWORD) or made for this time and told. port 0
    takes a free one. web, once: what the command was also asked for, to be refused where it makes no sense. The others
    are what the controls say at first. Raises UserError for what cannot be opened, a port in use, a missing extra or a
    short password.
    """
    if not web:
        raise UserError("two models are compared on the page", hint="add --web")
    if once is not None:
        raise UserError("--once answers in the terminal", hint="leave out --web")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the chat page needs Gradio, which is not installed", hint="pip install 'llama-ft[web]'")
    with listen(host, port) as listener:
        # Taken before the models are loaded: a port in use is told at once.
        password = None if is_loopback(listener) else password_of(os.environ)
        with for_good():
            from llama_ft.serve.web.page import Page, Settings
            from llama_ft.serve.web.speaker import Speaker
            from llama_ft.serve.web.voices import open_voices

        voices = open_voices(source, other, compare=compare)
        notices = [f"{voice.name}: {notice}" for voice in voices for notice in voice.opened.notices]
        systems = [voice.opened.system for voice in voices if voice.opened.system is not None]
        if system is None and systems:
            system = systems[-1]
            notices.append("the system prompt is the one of training")
        settings = Settings(system, temperature, top_p, max_tokens, seed)
        page = Page([Speaker(voice.name, voice.opened) for voice in voices], settings, notices)
        run(application(page, password), listener, _welcome(listener, host, password))


def application(page: Page, password: str | None) -> FastAPI:
    """The page behind its gate, as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware import Middleware

    from llama_ft.serve.web.gate import Gate
    from llama_ft.serve.web.look import CSS, ON_LOAD, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[Middleware(Gate, password=password)])
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,  # else the browser would keep every answer, and offer to send it to the hub
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=True,
        max_file_size=0,
        theme=theme(),
        css=CSS,
        js=ON_LOAD,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises UserError where that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        what = f"there is no address '{host}'"
        raise UserError(what, hint="--host 127.0.0.1 is this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        hint = "--port 0 takes a free one; other hosts are in `ip address`"
        raise UserError(f"cannot listen at {host}, port {port}: {error.strerror}", hint=hint) from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a bound socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def password_of(environment: Mapping[str, str]) -> str:
    """The password that the environment sets, or a new one of 96 bits. Raises UserError for a short one."""
    given = environment.get(PASSWORD)
    if given is None:
        return secrets.token_urlsafe(12)
    if len(given) < SHORTEST_PASSWORD:
        what = f"{PASSWORD} has {len(given)} characters: others could guess it"
        raise UserError(what, hint=f"take at least {SHORTEST_PASSWORD}, or unset it: one is then made up")
    return given


def run(app: FastAPI, listener: socket.socket, welcome: str) -> None:
    """Serves until Ctrl-C or SIGTERM. Open pages are not waited for."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(welcome, file=sys.stderr, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # What is cut off here is an answer, or the stream that every open page holds: no fault of anything.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1)
    server = Server(config)
    try:
        server.run([listener])
    except KeyboardInterrupt:  # raised again by uvicorn after a clean end
        return
    if not server.started:
        raise MachineFault("the chat page did not start", hint="the lines above say why")


def _welcome(listener: socket.socket, host: str, password: str | None) -> str:
    name = f"[{host}]" if ":" in host else host
    lines = [f"[chat page at http://{name}:{listener.getsockname()[1]}/ ; Ctrl-C ends it]"]
    if password is not None:
        told = "the one in LLAMA_FT_PASSWORD" if os.environ.get(PASSWORD) else password
        lines.append(f"[it asks for a name, which may be any, and a password: {told}]")
    return "\n".join(lines)
