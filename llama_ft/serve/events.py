"""An engine's stream of server-sent events, read into pieces of an answer, whatever the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from llama_ft.serve.refusal import EngineFault

DONE = "[DONE]"
MAX_EVENT = 4 * 1024 * 1024
REFUSED = (400, 422)
"""How an engine says that a request is wrong: as its answer's status, or as the code of an event."""


@dataclass(frozen=True)
class Piece:
    """What one event says: some text, why the answer ended, how many tokens the answer has. All of it may be absent."""

    text: str = ""
    finish: str | None = None
    tokens: int | None = None


async def pieces(stream: AsyncIterator[bytes]) -> AsyncIterator[Piece]:
    """Pieces until the stream ends. Raises EngineFault where the engine says so, or what it sends is no such stream."""
    async for data in payloads(stream):
        if data == DONE:
            return
        yield _piece(data)


async def payloads(stream: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each event. Lines are cut at line feeds alone: JSON may hold other separators, such as U+2028."""
    held = b""
    async for chunk in stream:
        *lines, held = (held + chunk).split(b"\n")
        if len(held) > MAX_EVENT:
            raise EngineFault("the engine sent an event without an end")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


def _piece(data: str) -> Piece:
    try:
        event: Any = json.loads(data)
    except ValueError as error:  # transformers serve writes an error's words into JSON without quoting them
        raise EngineFault(f"the engine failed: {data[:300]}") from error
    if not isinstance(event, dict) or event.get("error"):
        said = event.get("error") if isinstance(event, dict) else event
        message, code = (said.get("message"), said.get("code")) if isinstance(said, dict) else (said, None)
        refused = str(message)[:400] if code in REFUSED else None
        raise EngineFault(f"the engine failed: {message}"[:400], refused=refused)
    usage = event.get("usage") or {}
    choice = (event.get("choices") or [{}])[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return Piece(text, choice.get("finish_reason"), usage.get("completion_tokens"))
