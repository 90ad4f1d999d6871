"""Answers in the shapes of OpenAI's API, the same from every engine: whole, and as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any


class Shape:
    """One answer under way: its id, its time, the name the client used. `chat`: of a chat, else of bare text."""

    def __init__(self, model: str, chat: bool):
        self.model, self.chat = model, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> bytes:
        """The body of an answer in one."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return _json({**self._head(kind), "choices": [choice], "usage": usage})

    def chunk(self, text: str | None, *, first: bool = False, finish: str | None = None) -> bytes:
        """An event with some text; the first of a chat names the role, the last says why it ended."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.chat:
            choice["delta"] = {
                **({"role": "assistant"} if first else {}),
                **({} if text is None else {"content": text}),
            }
        else:
            choice["text"] = text or ""
        return event(_json({**self._head(self._chunk), "choices": [choice]}))

    def usage(self, usage: dict[str, int]) -> bytes:
        """The event that `stream_options.include_usage` asks for."""
        return event(_json({**self._head(self._chunk), "choices": [], "usage": usage}))

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def count(prompt: int, answer: int) -> dict[str, int]:
    """Tokens of an answer, as the API names them."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
