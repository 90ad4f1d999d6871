"""What a server takes, in numbers; stated when it starts."""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_TOKENS = 512
"""Longest answer where the request names none: as in `llama-ft chat`."""


@dataclass(frozen=True)
class Limits:
    """Requests taken at once, bytes of a body; seconds for each wait, so that nothing hangs."""

    concurrent: int = 16
    body: int = 1_000_000
    upload: float = 30.0
    turn: float = 600.0
    silence: float = 300.0
    send: float = 60.0
    start: float = 900.0
    """upload: until a body is there. turn: until the engine is free. silence: between two tokens of the engine, the
    first one included. send: until a client takes what it is sent. start: until an engine is ready."""


def show_size(size: int) -> str:
    """`1 MB`."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"
