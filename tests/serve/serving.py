"""A real `llama-ft serve` to ask, and engines that fail on purpose, which no real one can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import psutil

KEY = "a-key-of-the-tests-0123456789"
CLI = [sys.executable, "-m", "llama_ft.cli", "serve"]


class Serving:
    """The command, started on a free port; its line has been read when the `with` block begins."""

    def __init__(
        self, *arguments: str, key: str | None = KEY, environment: dict[str, str] | None = None, wait: int = 600
    ):
        self.arguments, self.key, self.wait = arguments, key, wait
        self.environment = os.environ | (environment or {}) | ({"LLAMA_FT_API_KEY": key} if key else {})
        if key is None:
            self.environment.pop("LLAMA_FT_API_KEY", None)

    def __enter__(self) -> Serving:
        self.process = subprocess.Popen(
            [*CLI, *self.arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(self.process.stdout.readline()), daemon=True).start()
        try:
            self.line = lines.get(timeout=self.wait)
        except queue.Empty:
            self.line = ""
        if not self.line:
            self.process.terminate()
            raise AssertionError(f"it did not start: {self.process.communicate(timeout=60)[1]}")
        self.url = re.search(r"http://\S+/v1", self.line)[0].removesuffix("/v1")
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def client(self, **more: Any) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **more)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status and stderr after a signal."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.end()
        for child in self.children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def ask(client: httpx2.Client, model: str, question: str, **more: Any) -> httpx2.Response:
    messages = [{"role": "user", "content": question}]
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages, **more})


def streamed(client: httpx2.Client, model: str, question: str, **more: Any) -> list[dict[str, Any]]:
    """All events of a streamed answer, the [DONE] checked and left out."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True, **more}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.read().decode().split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


@contextlib.contextmanager
def listening(app: Callable[..., Any] | None = None, make: Callable[[], Any] | None = None) -> Iterator[str]:
    """A real uvicorn in a thread, with `app`, or what `make` gives inside of its event loop; its address."""
    import uvicorn

    from llama_ft.serve.server import bound

    listener = bound("127.0.0.1", 0)
    ready, server = threading.Event(), None

    async def main() -> None:
        nonlocal server
        made = make() if make is not None else None
        config = uvicorn.Config(
            made.app if made else app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving
        if made:
            await made.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "it hangs"


def copied(run: Path, folder: Path) -> Path:
    """The same run under another name."""
    folder.symlink_to(run)
    return folder
