"""From drawn tokens to what they say, and when they have said enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_ft.llama.sampling import Sampled
from llama_ft.serve.stops import Cutter

TAIL = 8
"""Last tokens of a prompt that an answer is decoded with: some tokenizers drop a space that a text begins with."""


@dataclass(frozen=True)
class Answer:
    """One answer. `tokens`: its ids, with the one that ended it; `text`: what they say after the prompt, cut before a
    stop string, control tokens left out. `ended`: by the model's end token, by a stop string, or by length."""

    text: str
    tokens: list[int]
    ended: Literal["end", "stop", "length"]


def read_answer(tokenizer: Any, prompt: Sequence[int], drawn: Sampled, stop: Sequence[str]) -> Answer:
    """What drawn tokens say behind a prompt, up to the first stop string."""
    before = _decode(tokenizer, list(prompt[-TAIL:]))
    whole = _decode(tokenizer, [*prompt[-TAIL:], *drawn.ids])
    text = whole.removeprefix(before) if whole.startswith(before) else _decode(tokenizer, drawn.ids)
    cutter = Cutter(list(stop))
    shown = cutter.feed(text)
    if cutter.cut:
        return Answer(shown, drawn.ids, "stop")
    return Answer(text, drawn.ids, "end" if drawn.ended else "length")


class Stops:
    """Whether an answer so far holds a stop string; only its last tokens are looked at, for it is asked at each."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.tail = 4 + max(len(stop.encode()) for stop in stops)  # a token has a byte at least

    def __call__(self, ids: list[int]) -> bool:
        said = _decode(self.tokenizer, ids[-self.tail :])
        return any(stop in said for stop in self.stops)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def seed_of(seed: int, prompt: int, number: int) -> int:
    """A 64-bit seed of its own for every answer (NumPy's SeedSequence mixes what it is given)."""
    return int(np.random.SeedSequence([seed % 2**63, prompt, number]).generate_state(1, np.uint64)[0])
