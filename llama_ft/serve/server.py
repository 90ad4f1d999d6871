"""`serve`: an engine as a child process, the gateway before it, one line that says where; and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.errors import MachineFault, UserError
from llama_ft.serve.child import Child, free_port
from llama_ft.serve.limits import ANSWER_TOKENS, Limits, show_size
from llama_ft.sizes import parse_size

if TYPE_CHECKING:
    from llama_ft.serve.engines import Engine, Launch
    from llama_ft.serve.gateway import Model

_NEEDED = ("starlette", "uvicorn", "httpx2")
_POLL = 0.2
_LAST_WORDS = 5.0


def serve(
    sources: Sequence[str],
    *,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    compare: bool = False,
    max_concurrent: int = 16,
    max_body: str = "1MB",
    debug: bool = False,
) -> None:
    """Serves runs and models over OpenAI's HTTP API until Ctrl-C or SIGTERM.

    port: 0 takes a free one. debug: what the engines write goes to stderr. Raises UserError before anything is loaded
    where the address, the key, a model or an engine cannot be used; MachineFault when an engine does not start or dies.
    """
    absent = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"serving needs {', '.join(absent)}", hint="pip install 'llama-ft[serve]'")
    limits = Limits(concurrent=max_concurrent, body=parse_size(max_body, "--max-body"))
    check_key(host, api_key)
    with bound(host, port) as listener, tempfile.TemporaryDirectory(prefix="llama-ft-serve-") as stage:
        # Only now: the mistakes above should not wait for torch.
        from llama_ft.serve.engines import LLAMA_CPP, TRANSFORMERS, choose, launch_llama_cpp, launch_transformers
        from llama_ft.serve.served import find_served
        from llama_ft.serve.vllm import VLLM, launch_vllm

        models = find_served(sources, compare=compare)
        chosen = choose(engine, {one.name: one for one in (VLLM, TRANSFORMERS, LLAMA_CPP)}, models)
        launch = {"vllm": launch_vllm, "transformers": launch_transformers, "llama-cpp": launch_llama_cpp}[chosen.name]
        launches = launch(models, Path(stage), free_port)
        server = Server(chosen, launches, [served.name for served in models], limits, api_key, Path(stage), debug)
        asyncio.run(server.run(listener))


def check_key(host: str, key: str | None) -> None:
    """UserError where others than this machine could ask without a key, or the key is one that can be guessed."""
    if key is not None and (len(key) < 16 or not key.isascii() or not key.isprintable() or " " in key):
        hint = "make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        raise UserError(
            "an API key has at least 16 characters of ASCII, and no space", key="LLAMA_FT_API_KEY", hint=hint
        )
    if key is None and not is_loopback(host):
        hint = "set LLAMA_FT_API_KEY, or leave out --host"
        raise UserError(f"on {host} others could use this server: that takes an API key", key="--host", hint=hint)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and nobody else's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket on the address, not listening yet. UserError where it is taken or not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host} is no address of this machine: {error}", key="--host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        hint = "--port 0 takes a free one"
        raise UserError(f"{host} port {port} cannot be used: {error.strerror}", key="--port", hint=hint) from error
    return listener


class Server:
    """Children and gateway, from the start to the end of both."""

    def __init__(
        self,
        engine: Engine,
        launches: Sequence[Launch],
        names: Sequence[str],
        limits: Limits,
        key: str | None,
        stage: Path,
        debug: bool = False,
    ):
        """names: the public ones, in the user's order. stage: folder that the children are started in."""
        self.engine, self.launches, self.names = engine, launches, names
        self.limits, self.key, self.stage, self.debug = limits, key, stage, debug
        self.children: list[Child] = []

    async def run(self, listener: socket.socket) -> None:
        """Starts, serves, ends. Raises what went wrong, after everything has been ended."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            await self._until(stop, self._start())
            if not stop.is_set():
                await self._serve(listener, stop)
        finally:
            # Once more is impatience, and the children's end is near.
            await asyncio.gather(*(child.stop() for child in self.children))

    async def _until(self, stop: asyncio.Event, work: Any) -> None:
        """Does `work` unless `stop` is set before. Raises what it raises."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(done[0], Exception):
            raise done[0]

    async def _start(self) -> None:
        """Starts all children and waits until each of them answers as it should."""
        from llama_ft.serve.engines import child_environment

        _say(f"starting {self.engine.title}: {', '.join(self.names)}")
        for launch in self.launches:
            title = f"{self.engine.title} ({', '.join(launch.ids)})"
            environment = child_environment(launch)
            child = await Child.start(title, launch.line, folder=self.stage, environment=environment, echo=self.debug)
            self.children.append(child)
        ready = [self._ready(child, launch) for child, launch in zip(self.children, self.launches, strict=True)]
        await _all(*ready)

    async def _ready(self, child: Child, launch: Launch) -> None:
        """Raises MachineFault where the child ends before it is ready, or is not ready in time."""
        try:
            async with asyncio.timeout(self.limits.start):
                await _first(child.ended(), self._answers(launch))
        except TimeoutError as error:
            what = f"{child.title} was not ready after {self.limits.start:g} seconds; its last words:\n{child.said()}"
            raise MachineFault(what) from error

    async def _answers(self, launch: Launch) -> None:
        """Waits until the engine is up; then it must read a first question as training would: as many tokens."""
        import httpx2

        headers = {"Authorization": f"Bearer {launch.key}"} if launch.key else {}
        url = f"http://127.0.0.1:{launch.port}"
        async with httpx2.AsyncClient(trust_env=False, timeout=self.limits.silence, headers=headers) as client:
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    if (await client.get(url + self.engine.ready)).status_code == 200:
                        break
                await asyncio.sleep(_POLL)
            if self.engine.fit is not None:
                self.engine.fit(launch, (await client.get(f"{url}/v1/models")).json()["data"])
            for name, model in launch.ids.items():
                reader = launch.readers[name]
                if reader.renderer is None:
                    continue
                messages = [{"role": "user", "content": "Hi"}]
                body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0.0}
                try:
                    reply = await client.post(f"{url}/v1/chat/completions", json=body)
                except httpx2.HTTPError as error:
                    await asyncio.sleep(_LAST_WORDS)  # if it died, that is the better thing to tell
                    raise MachineFault(f"{name} does not answer a first question: {type(error).__name__}") from error
                if reply.status_code != 200:
                    if reply.status_code >= 500:
                        await asyncio.sleep(_LAST_WORDS)  # as above
                    raise MachineFault(f"{name} does not answer: {self.engine.title} says {reply.text[:300]}")
                read, wanted = reply.json()["usage"]["prompt_tokens"], len(reader.chat(messages, None))
                if read != wanted:
                    what = f"{self.engine.title} reads a question to {name} as {read} tokens, training as {wanted}"
                    raise MachineFault(what, hint="its template is not the run's")

    async def _serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        import uvicorn

        from llama_ft.serve.gateway import Gateway

        gateway = Gateway(self._models(), self.limits, self.key)
        config = uvicorn.Config(
            gateway.app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            limit_concurrency=self.limits.concurrent + 512,
        )
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        deaths = [asyncio.ensure_future(child.ended()) for child in self.children]
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            print(self._line(listener), flush=True)
            await asyncio.wait([serving, *deaths], return_when=asyncio.FIRST_COMPLETED)
            fault = next((death.result() for death in deaths if death.done()), None)
            gateway.healthy = False
            server.should_exit = True
            await serving
        finally:
            for death in deaths:
                death.cancel()
            await gateway.close()
        if fault is not None and not stop.is_set():
            raise fault
        _say("stopped")

    def _models(self) -> list[Model]:
        from llama_ft.serve.gateway import Model

        found: dict[str, Model] = {}
        for launch in self.launches:
            turns = asyncio.Semaphore(self.engine.at_once or self.limits.concurrent)
            url = f"http://127.0.0.1:{launch.port}"
            for name, known_as in launch.ids.items():
                found[name] = Model(name, known_as, url, launch.readers[name], self.engine, turns, launch.key)
        return [found[name] for name in self.names]

    def _line(self, listener: socket.socket) -> str:
        """Where, what and how much: one line."""
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        notes = ", ".join(dict.fromkeys(launch.note for launch in self.launches))
        contexts = {launch.readers[name].context for launch in self.launches for name in launch.ids}
        context = "/".join(str(one) for one in sorted(contexts))
        one = self.engine.at_once
        turns = f", {'one' if one == 1 else one} answered at a time by each model" if one else ""
        who = "for whoever has the API key" if self.key else "no API key: for this machine alone"
        return (
            f"serving {', '.join(self.names)} at {address} · {self.engine.title}, {notes} · context {context} tokens, "
            f"answers {ANSWER_TOKENS} unless max_tokens says more · {self.limits.concurrent} requests at once{turns} · "
            f"bodies to {show_size(self.limits.body)} · {who}"
        )


async def _all(*work: Any) -> None:
    """Does all of it, or raises what the first of them raises and gives the others up."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(death: Any, work: Any) -> None:
    """Waits for `work`; raises the fault that `death` returns if that comes first."""
    tasks = [asyncio.ensure_future(death), asyncio.ensure_future(work)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[1].done():
            tasks[1].result()
        else:
            raise tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _say(text: str) -> None:
    """Everything but the line that says where goes to stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)
