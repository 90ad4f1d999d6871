"""The gateway before the engines: who may ask, for what, how much at once. It holds no model and makes no token.

Routes: POST /v1/chat/completions and /v1/completions, GET /v1/models and /v1/models/NAME, GET /health. Whatever else an
engine offers (loading other models, resetting it, other APIs) stays behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llama_ft.errors import did_you_mean
from llama_ft.serve.answer import Answer
from llama_ft.serve.engines import Engine
from llama_ft.serve.fields import Body, parse, read
from llama_ft.serve.limits import Limits, show_size
from llama_ft.serve.reader import Reader
from llama_ft.serve.refusal import Refusal

LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
_BUSY = 5  # seconds after which a refused request may come again


@dataclass(frozen=True)
class Model:
    """A public name, and how to reach what answers to it: the engine's own `id` for it, at `url`, with its `key`."""

    name: str
    id: str
    url: str
    reader: Reader
    engine: Engine
    turns: asyncio.Semaphore
    key: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the engine carries."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass
class Slot:
    """A turn at an engine. `finished` stays False where the answer was given up before its end."""

    finished: bool = False


class Gateway:
    """The application, `app`, over the models. Made and used inside a running event loop."""

    def __init__(self, models: Sequence[Model], limits: Limits, key: str | None = None):
        """key: what a client must present; None lets this machine alone ask, by one of its own names."""
        self.models: Mapping[str, Model] = {model.name: model for model in models}
        self.limits = limits
        self.healthy = True
        self._inside = 0
        self._settling: set[asyncio.Task[None]] = set()
        timeout = httpx2.Timeout(connect=10, read=limits.silence, write=30, pool=None)
        no_limits = httpx2.Limits(max_connections=None)  # ours are in `turn`
        # No proxy of the environment stands between two processes of one machine.
        self.client = httpx2.AsyncClient(timeout=timeout, limits=no_limits, trust_env=False)
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
            Route("/v1/models", self._list, methods=["GET"]),
            Route("/v1/models/{name:path}", self._one, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        handlers: Any = {Refusal: _refused, HTTPException: _no_route, ClientDisconnect: _nobody}
        guard = Middleware(Guard, key=key)
        self.app = Starlette(routes=routes, exception_handlers=handlers, middleware=[guard])

    async def close(self) -> None:
        """Ends what is under way to the engines."""
        for task in self._settling:
            task.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self.client.aclose()

    # Routes

    async def _chat(self, request: Request) -> Any:
        return await self._answer(request, chat=True)

    async def _text(self, request: Request) -> Any:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Any:
        """Refusal 429 when too many are here already, the waiting counted in."""
        if self._inside >= self.limits.concurrent:
            await self._read(request)
            what = f"{self.limits.concurrent} requests are being answered or wait; ask again later"
            raise Refusal(429, what, code="too_many_requests", retry=_BUSY)
        self._inside += 1
        try:
            body = await self._body(request)
            model = self._model(body)
            ask = read(body, chat=chat, passes=model.engine.passes)
            if chat:  # in a thread: a megabyte of text takes a second, and others are being answered
                ids = await asyncio.to_thread(model.reader.chat, ask.messages, ask.tools)
            else:
                ids = await asyncio.to_thread(model.reader.text, ask.prompt or "")
            return Answer(self, model, ask, len(ids), ask.room(len(ids), model.reader.context))
        except BaseException:
            self.left()
            raise

    def left(self) -> None:
        """A request that was let in has been answered, or given up."""
        self._inside -= 1

    async def _body(self, request: Request) -> Body:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a form of another site's page, which a browser would send, is not
            raise Refusal(415, "the body must be application/json", code="unsupported_media_type")
        text = await self._read(request)
        if len(text) > self.limits.body:
            raise Refusal(413, f"the body is larger than {show_size(self.limits.body)}", code="request_too_large")
        return await asyncio.to_thread(parse, bytes(text))

    async def _read(self, request: Request) -> bytearray:
        """The body, or more than is allowed of it; the rest of that is taken and dropped, up to ten times as much.

        Most clients read no answer before all is sent, and find the line cut instead.
        """
        text, taken, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(self.limits.upload):
                while more and taken <= 10 * self.limits.body:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    taken += len(piece)
                    if len(text) <= self.limits.body:
                        text += piece
        except TimeoutError as error:
            what = f"the body did not arrive within {self.limits.upload:g} seconds"
            raise Refusal(408, what, code="request_timeout") from error
        return text

    def _model(self, body: Body) -> Model:
        name = body.get("model")
        if not isinstance(name, str):
            raise Refusal(400, "no model is named", param="model", code="missing_field")
        if name not in self.models:
            hint = did_you_mean(name[:200], self.models, kind="models")
            raise Refusal(404, f"there is no model '{name[:200]}': {hint}", param="model", code="model_not_found")
        return self.models[name]

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(model) for model in self.models.values()]})

    async def _one(self, request: Request) -> Response:
        return JSONResponse(_described(self._model({"model": request.path_params["name"]})))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok" if self.healthy else "ending"}, 200 if self.healthy else 503)

    # Turns

    @asynccontextmanager
    async def turn(self, model: Model) -> AsyncIterator[Slot]:
        """Waits for a turn at the engine, first come, first served. Refusal 503 when none comes in time."""
        slot = Slot()
        try:
            async with asyncio.timeout(self.limits.turn):
                await model.turns.acquire()
        except TimeoutError as error:
            what = f"the engine was not free for {self.limits.turn:g} seconds"
            raise Refusal(503, what, code="engine_busy", retry=_BUSY) from error
        try:
            yield slot
        finally:
            if slot.finished or not model.engine.settles:
                model.turns.release()
            else:
                task = asyncio.create_task(self._settle(model))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)

    async def _settle(self, model: Model) -> None:
        """Gives the turn on when the engine has let go of an answer that was given up: it works them off in order."""
        try:
            body = {"model": model.id, "prompt": "a", "max_tokens": 1}
            with contextlib.suppress(httpx2.HTTPError):  # if it is gone, the next one finds out
                await self.client.post(f"{model.url}/v1/completions", json=body, headers=model.headers)
        finally:
            model.turns.release()


class Guard:
    """Who may ask: with a key whoever presents it, without one whoever calls this machine by one of its own names.

    The name matters since a page in a browser can reach loopback under a name of its author's (DNS rebinding).
    """

    def __init__(self, app: Any, key: str | None):
        self.app = app
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request on, or answers 401 or 403. /health is open: it tells nothing."""
        refusal = self._judge(scope) if scope["type"] == "http" and scope["path"] != "/health" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)

    def _judge(self, scope: Any) -> Refusal | None:
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"host")}
        if self._digest is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() in LOCAL_HOSTS:
                return None
            return Refusal(403, f"'{name[:100]}' is not a name of this machine: use localhost", code="wrong_host")
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Digests are of one length, and their comparison takes the same time wherever they differ.
        if hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest) and scheme.lower() == b"bearer":
            return None
        what = "the API key is wrong" if given else "no API key is given: send it as 'Authorization: Bearer KEY'"
        return Refusal(401, what, code="invalid_api_key")


def _described(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "llama_ft"}


async def _refused(request: Request, refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    allow = (error.headers or {}).get("Allow")
    what = f"{request.method} {request.url.path[:200]} is not served here"
    if allow:
        what += f": use {allow}"
    refusal = Refusal(error.status_code, what, code="not_found" if error.status_code == 404 else None)
    return JSONResponse(refusal.body(), error.status_code, error.headers)


async def _nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
