"""What the page writes of a conversation, and reads from its controls."""

from __future__ import annotations

import html
import secrets
from typing import Any

from llama_ft.serve.web.speaker import Answer, Sampling
from llama_ft.serve.web.talk import Malformed, Side

LARGEST_SEED = 2**31 - 1


def messages(formatted: bool, side: Side, question: str = "", answer: str = "") -> list[dict[str, Any]]:
    """What a chat shows: all that was said, and what is being said. Not formatted, HTML is letters too.

    Texts go as parts: Gradio takes the indentation off a bare string.
    """
    said = [*side.said, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    shown = [(str(message["role"]), str(message["content"])) for message in said if message["content"]]
    return [{"role": role, "content": [{"type": "text", "text": _text(text, formatted)}]} for role, text in shown]


def _text(text: str, formatted: bool) -> str:
    return text if formatted else html.escape(text, quote=False)


def cost_line(answer: Answer, sampling: Sampling) -> str:
    """One line below an answer: tokens, speed, how it was drawn, how it ended."""
    parts = []
    if answer.tokens:
        parts.append(f"{answer.tokens} {'token' if answer.tokens == 1 else 'tokens'}")
        parts += [f"{answer.rate:.1f} tokens/s"] if answer.rate is not None else []
        parts.append(f"first after {answer.first:.2f} s")
    parts.append("greedy" if sampling.temperature == 0 else f"seed {sampling.seed}")
    if answer.ended is not None:
        empty = "no words: the question is not kept" if not answer.text else answer.ended
        parts.append(empty)
    return html.escape(" · ".join([*parts, *answer.notices]))


def sampling_of(temperature: float | None, top_p: float | None, max_tokens: float | None, seed: str | None) -> Sampling:
    """The controls' values. Raises Malformed where one is empty or makes no sense."""
    if temperature is None or top_p is None or max_tokens is None:
        raise Malformed("Temperature, top-p and the longest answer want a number.")
    if not (temperature >= 0 and 0 <= top_p <= 1 and max_tokens >= 1):
        raise Malformed("Temperature is at least 0, top-p from 0 to 1, the longest answer at least 1.")
    digits = str(seed or "").strip()
    if digits and not (digits.isascii() and digits.isdigit() and int(digits) <= LARGEST_SEED):
        raise Malformed(f"The seed is a whole number from 0 to {LARGEST_SEED:,}, or empty.")
    drawn = int(digits) if digits else secrets.randbelow(10**6)
    return Sampling(float(temperature), float(top_p), int(max_tokens), drawn)


def clean(text: Any) -> str:
    """Half of a surrogate pair is no text, and no tokenizer takes it."""
    return str(text or "").encode("utf-8", "replace").decode("utf-8")
