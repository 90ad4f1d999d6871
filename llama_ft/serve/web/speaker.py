"""One model's answer, word by word, with what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tokenizers.decoders import DecodeStream

from llama_ft.serve.conversation import Dialogue
from llama_ft.serve.generate import Generator
from llama_ft.serve.source import Opened
from llama_ft.serve.web.talk import Side

SHOWN_EVERY = 0.08
"""Seconds between two states of an answer on the page."""
# One model computes at a time, and always in this thread: OpenMP keeps a team of threads for each that computes, and a
# web server has many.
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="model")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; every answer starts from the seed anew."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """An answer so far. `first`: seconds to the first token; `rest`: seconds that the others took.

    Both are the model's own, without the time in which the page was shown. `ended`: why it is over, else None.
    `notices`: what had to be forgotten for it.
    """

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    ended: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first, or None where there are none."""
        return (self.tokens - 1) / self.rest if self.tokens > 1 and self.rest > 0 else None


class Speaker:
    """A model that answers one question at a time. What it has seen last is kept in one KV cache, whoever asked."""

    def __init__(self, name: str, opened: Opened):
        self.name, self.opened = name, opened
        self._generator = Generator(opened.model, opened.stop, opened.context, seed=0)
        self._asked: object = None

    def answer(
        self, side: Side, system: str, question: str, sampling: Sampling, stopped: Callable[[], bool]
    ) -> Iterator[Answer]:
        """Yields states of the answer, the last with `ended`; then notes question and answer in `side`.

        An answer without a word leaves `side` as it was. Raises Refused, before the first state, where template or
        context do not take the question. A second call ends the first, wherever that was left.
        """
        dialogue = Dialogue(self.opened.renderer, self.opened.context, system or None)
        dialogue.turns = side.said[side.forgotten :]
        ids = dialogue.ask(question, sampling.max_tokens)
        state = Answer(notices=tuple(dialogue.notices))
        yield state
        tokens: list[int] = []
        shown = time.perf_counter()
        for token, piece, seconds in self._tokens(ids, sampling, stopped):
            tokens.append(token)
            if state.tokens == 0:
                state = replace(state, tokens=1, first=seconds, text=piece.lstrip())
            else:
                text = state.text + piece if state.text else piece.lstrip()
                state = replace(state, tokens=len(tokens), rest=state.rest + seconds, text=text)
            if len(tokens) == 1 or time.perf_counter() - shown > SHOWN_EVERY:
                yield state
                shown = time.perf_counter()
        # Decoded as a whole, as a training row would hold it.
        text = str(dialogue.renderer.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        if text:
            asked = dialogue.turns
            side.forgotten = len(side.said) + 1 - len(asked)
            side.said = [*side.said, asked[-1], {"role": "assistant", "content": text}]
        yield replace(state, text=text, ended=self._ended(tokens, len(ids), sampling, stopped()))

    def _ended(self, tokens: list[int], prompt: int, sampling: Sampling, stopped: bool) -> str:
        if stopped:
            return "stopped"
        if len(tokens) >= sampling.max_tokens:
            return f"cut at {sampling.max_tokens} tokens"
        if prompt + len(tokens) >= self.opened.context:
            return f"cut: the model holds {self.opened.context} tokens"
        return "complete"

    def _tokens(
        self, ids: list[int], sampling: Sampling, stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, str, float]]:
        """Token, the characters that it completes, seconds it took. Each is a job of its own: an answer that nobody
        reads any more does not stand in the way of the next."""
        me = object()
        decoder = DecodeStream(skip_special_tokens=True)
        backend = self.opened.renderer.tokenizer.backend_tokenizer

        def start() -> Iterator[int]:
            self._asked = me
            self._generator.random.manual_seed(sampling.seed)
            return self._generator.stream(
                ids, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p
            )

        def step() -> tuple[int | None, float]:
            began = time.perf_counter()
            token = next(stream, None) if self._asked is me else None
            return token, time.perf_counter() - began

        stream = _THREAD.submit(start).result()
        while not stopped():
            token, took = _THREAD.submit(step).result()
            if token is None:
                return
            yield token, decoder.step(backend, token) or "", took
