"""A chat page that really runs, in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from llama_ft.serve.web.page import Page, Settings
from llama_ft.serve.web.server import application, listen
from llama_ft.serve.web.speaker import Speaker
from llama_ft.serve.web.voices import open_voices

GREEDY = Settings(system=None, temperature=0.0, top_p=1.0, max_tokens=48, seed=None)


def make_page(source: object, other: object = None, *, compare: bool = False, settings: Settings = GREEDY) -> Page:
    voices = open_voices(str(source), None if other is None else str(other), compare=compare)
    return Page([Speaker(voice.name, voice.opened) for voice in voices], settings, [])


@contextmanager
def served(page: Page, password: str | None = None) -> Iterator[str]:
    """The page's address while it is served."""
    listener = listen("127.0.0.1", 0)
    app = application(page, password)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it had started"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"
