"""One answer: a turn at the engine, its pieces to the client as they come, and an end in every case.

The engine is always asked for a stream, for an answer in one too: so a client that goes away ends its answer there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2

from llama_ft.serve.events import REFUSED, Piece, pieces
from llama_ft.serve.fields import Ask
from llama_ft.serve.refusal import EngineFault, Refusal
from llama_ft.serve.shapes import Shape, count, event
from llama_ft.serve.stops import Cutter

if TYPE_CHECKING:
    from llama_ft.serve.gateway import Gateway, Model, Slot

JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
EVENTS += [(b"x-accel-buffering", b"no")]  # proxies are not to collect them


@dataclass
class End:
    """How an answer ended (`stop` or `length`) and what it cost, in tokens."""

    finish: str = ""
    usage: dict[str, int] = field(default_factory=dict)


class Answer:
    """An ASGI response. `prompt`: tokens of the request; `room`: tokens that the answer may have."""

    def __init__(self, gateway: Gateway, model: Model, ask: Ask, prompt: int, room: int):
        self.gateway, self.model, self.ask = gateway, model, ask
        self.prompt, self.room = prompt, room
        self.shape = Shape(model.name, chat=ask.prompt is None)
        self._inside = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers, unless the client goes away first: then whatever was under way for it is given up."""
        work, gone = asyncio.ensure_future(self._respond(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._leave()
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    def _leave(self) -> None:
        if self._inside:
            self._inside = False
            self.gateway.left()

    async def _respond(self, send: Any) -> None:
        out = _Out(send, self.gateway.limits.send, self.shape.id)
        try:
            async with self.gateway.turn(self.model) as slot, self._asked() as answer:
                last = await (self._stream if self.ask.stream else self._whole)(answer, out, slot)
            self._leave()  # before the last word: who has read that may ask again at once
            await out.begin(200, EVENTS if self.ask.stream else JSON)
            await out.write(last, last=True)
        except Refusal as refusal:
            self._leave()
            await out.refuse(self._blamed(refusal))
        except TimeoutError:  # the client takes nothing: its connection is dropped
            return

    def _blamed(self, refusal: Refusal) -> Refusal:
        """An engine that finds a request wrong means the fields it was passed as they came: the rest is our writing."""
        fields = ", ".join(self.ask.passed)
        if not fields or not isinstance(refusal, EngineFault) or refusal.refused is None:
            return refusal
        return Refusal(400, f"the engine does not take {fields}: {refusal.refused}", param=fields, code="invalid_value")

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[AsyncIterator[Piece]]:
        """The engine's answer. Whatever goes wrong on the way there is an EngineFault."""
        body = self.model.engine.write(self.ask, self.model.reader, self.model.id, self.room)
        path = "/v1/chat/completions" if self.ask.prompt is None else "/v1/completions"
        try:
            async with self.gateway.client.stream(
                "POST", self.model.url + path, json=body, headers=self.model.headers
            ) as r:
                if r.status_code != 200:
                    said = _detail(await r.aread())
                    refused = said if r.status_code in REFUSED else None
                    raise EngineFault(f"the engine answered {r.status_code}: {said}", refused=refused)
                yield pieces(r.aiter_bytes())
        except httpx2.ReadTimeout as error:
            silence = self.gateway.limits.silence
            raise EngineFault(f"the engine said nothing for {silence:g} seconds", status=504) from error
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise EngineFault(f"the engine is gone ({type(error).__name__})") from error

    async def _said(self, answer: AsyncIterator[Piece], end: End, slot: Slot) -> AsyncIterator[str]:
        """Texts to show, in order. `end` is filled in; a stop string ends the answer here and at the engine."""
        cutter, said, tokens = Cutter(self.ask.stop), "", None
        async for piece in answer:
            said += piece.text
            if shown := cutter.feed(piece.text):
                yield shown
            end.finish = "stop" if cutter.cut else piece.finish or end.finish
            tokens = piece.tokens if piece.tokens is not None else tokens
            if cutter.cut:
                break
        else:
            slot.finished = True
        if shown := cutter.rest():
            yield shown
        if not end.finish:
            raise EngineFault("the engine's answer broke off")
        if tokens is None:
            tokens = await asyncio.to_thread(self.model.reader.count, said)
        end.usage = count(self.prompt, tokens)

    async def _whole(self, answer: AsyncIterator[Piece], out: _Out, slot: Slot) -> bytes:
        end = End()
        text = "".join([shown async for shown in self._said(answer, end, slot)])
        return self.shape.whole(text, end.finish, end.usage)

    async def _stream(self, answer: AsyncIterator[Piece], out: _Out, slot: Slot) -> bytes:
        """The status waits for the engine's first word, so that a fault before it has a status of its own."""
        end, first = End(), True
        async for shown in self._said(answer, end, slot):
            await out.begin(200, EVENTS)
            await out.write(self.shape.chunk(shown, first=first))
            first = False
        last = self.shape.chunk("" if first else None, first=first, finish=end.finish)
        return last + (self.shape.usage(end.usage) if self.ask.usage else b"") + event(b"[DONE]")


class _Out:
    """What is sent to one client; a client that takes nothing for `seconds` raises TimeoutError."""

    def __init__(self, send: Any, seconds: float, request_id: str):
        self._send, self._seconds, self._id = send, seconds, request_id
        self._begun = False

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends status and headers, once."""
        if self._begun:
            return
        self._begun = True
        headers = [*headers, (b"x-request-id", self._id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, last: bool = False) -> None:
        async with asyncio.timeout(self._seconds):
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def refuse(self, refusal: Refusal) -> None:
        """An error as the whole answer, or as the last event of a stream that has begun."""
        body = json.dumps(refusal.body(), ensure_ascii=False).encode("utf-8")
        if self._begun:
            await self.write(event(body), last=True)
            return
        await self.begin(refusal.status, [*JSON, *((k.encode(), v.encode()) for k, v in refusal.headers.items())])
        await self.write(body, last=True)


async def _gone(receive: Any) -> None:
    """Until the client has gone. The body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _detail(body: bytes) -> str:
    """An engine's own words for an error."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        found = value.get("detail") or value.get("error") if isinstance(value, dict) else None
        text = str(found.get("message") if isinstance(found, dict) else found or text)
    return text[:300]
