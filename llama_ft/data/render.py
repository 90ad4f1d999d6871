"""One render of a conversation gives its text, its token ids and its labels.

The render is transformers' own (`render_jinja_template`, the engine of `apply_chat_template`), the labels come from the
`{% generation %}` spans of that render, and ids and labels come from one tokenisation of that text. Nothing is
tokenised in parts, so training ids equal what a server computes from the same template.

A token that straddles the start of an answer is masked, as the original projects did: they masked as many tokens as
the prompt alone has, and such a token is the last of those.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_ft.data.layouts import Conversation, Message
from llama_ft.data.template import Template
from llama_ft.tokenizer.text import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKED = -100
TrainOn = Literal["responses", "all", "last_response"]
Span = tuple[int, int]


class TemplateRefusal(Exception):
    """The template does not take this conversation; the message says why, in the template's own words."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation. `spans` are the [start, end) characters of `text` that are the assistant's.

    `sealed` is set where a message holds a control string: the text to tokenise in place of `text`, with the
    template's own control tokens under other names, and `shifts` to come back from its offsets to those of `text`.
    """

    text: str
    spans: list[Span]
    sealed: str | None = None
    shifts: tuple[list[int], list[int]] | None = None


@dataclass(frozen=True)
class Encoded:
    """A document: `ids` and `labels` int32 [tokens], `offsets` [start, end) characters of `text` per token.

    `closed` says whether every labelled span ends with the template's end token.
    """

    text: str
    ids: np.ndarray
    labels: np.ndarray
    offsets: list[Span]
    closed: bool


class Renderer:
    """A template bound to a tokenizer, with `bos_token`, `eos_token` … as `apply_chat_template` would fill them in."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerFast):
        self.template = template
        self.tokenizer = tokenizer
        # Special tokens are control strings everywhere, other added tokens only where the template writes them.
        self.control = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content in template.source and not token.content.isspace())
        ]
        longest_first = sorted(self.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._encoder = TextEncoder(tokenizer, self.control)
        # Stand-ins for control strings in a message while the template runs; drawn anew, so no data file holds them.
        nonce = secrets.token_hex(8)
        self._stand_in = {name: f"\U0010ffe0{nonce}.{i}\U0010ffe1" for i, name in enumerate(longest_first)}
        self._literal = {mark: name for name, mark in self._stand_in.items()}
        self._stand_ins = re.compile(f"\U0010ffe0{nonce}\\.\\d+\U0010ffe1")

    @cached_property
    def end_token_id(self) -> int | None:
        """The control token that closes an answer, or None; read off a probe conversation."""
        answer = "Yes"
        rendered = self.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}])
        if not rendered.spans:
            return None
        start, end = rendered.spans[-1]
        said = rendered.text.find(answer, start, end)
        if said < 0:
            return None
        encoding = self._encoder.encode([rendered.text])[0]
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a >= said + len(answer) and b <= end]
        last = encoding.ids[inside[-1]] if inside else None
        return last if last in self.tokenizer.added_tokens_decoder else None

    def missing_control(self) -> list[str]:
        """Control tokens that the template declares and the tokenizer lacks."""
        return [token for token in self.template.declared_control if token not in self.control]

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> Rendered:
        """Renders a conversation; raises :class:`TemplateRefusal` when the template does not take it."""
        risky = any(self._control.search(text) for message in conversation for text in _texts(message))
        messages = [self._stand_for_control(message) for message in conversation] if risky else conversation
        text, spans = self._run(messages, add_generation_prompt)
        self._refuse_loss(messages, text)
        return self._unseal(text, spans) if risky else Rendered(text, spans)

    def encode(self, rendered: Sequence[Rendered], train_on: TrainOn = "responses") -> list[Encoded]:
        """Tokenises many rendered conversations at once (the fast tokenizer uses all cores) and labels them."""
        ordinary = [r.text for r in rendered if r.sealed is None]
        sealed = [r.sealed for r in rendered if r.sealed is not None]
        plain = iter(self._encoder.encode(ordinary))
        odd = iter(self._encoder.encode_sealed(sealed) if sealed else ())
        documents = []
        for one in rendered:
            encoding = next(plain if one.sealed is None else odd)
            offsets = encoding.offsets if one.shifts is None else _shift(encoding.offsets, *one.shifts)
            ids = np.array(encoding.ids, dtype=np.int32)
            documents.append(self._label(one, ids, offsets, train_on))
        return documents

    def encode_one(self, conversation: Conversation, train_on: TrainOn = "responses") -> Encoded:
        """Renders and tokenises one conversation."""
        return self.encode([self.render(conversation)], train_on)[0]

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation that the model is to continue: ends with the start of an answer."""
        rendered = self.render(conversation, add_generation_prompt=True)
        return [int(token) for token in self.encode([rendered])[0].ids]

    def _run(self, messages: Conversation, add_generation_prompt: bool) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        marked = self.template.has_generation
        variables: dict[str, Any] = {
            **self.tokenizer.special_tokens_map,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # Annotated by transformers as a str, it returns a list of texts and a list of span lists.
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template.source,
                return_assistant_tokens_mask=marked,
                **variables,
            )
        # A template is a program of the user's: whatever it trips over is told as its refusal of this row.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        (text,), spans = rendered
        return text, list(spans[0]) if marked else []

    def _refuse_loss(self, messages: Conversation, text: str) -> None:
        """A template that knows no `input` or no system role would drop them without a word."""
        for message in messages:
            if "input" in message and message["input"].strip() not in text:
                raise TemplateRefusal(
                    f"the template '{self.template.name}' leaves out the row's input; alpaca takes it"
                )
            if message["role"] == "system" and message["content"].strip() not in text:
                raise TemplateRefusal(f"the template '{self.template.name}' leaves out the system prompt")

    def _stand_for_control(self, message: Message) -> Message:
        changed = message.copy()
        changed["content"] = self._control.sub(lambda match: self._stand_in[match[0]], message["content"])
        if "input" in message:
            changed["input"] = self._control.sub(lambda match: self._stand_in[match[0]], message["input"])
        return changed

    def _unseal(self, text: str, spans: list[Span]) -> Rendered:
        """The text as a reader sees it, and its sealed form, where only the template's control tokens are such."""
        # Three texts run in parallel: with stand-ins (where the spans are), plain, and sealed.
        plain: list[str] = []
        sealed: list[str] = []
        starts, to_plain = [0], [0]  # stand-in text -> plain
        sealed_starts, back = [0], [0]  # sealed text -> plain
        at = plain_at = sealed_at = 0
        for match in re.finditer(f"{self._stand_ins.pattern}|{self._control.pattern}", text):
            piece = text[at : match.start()]
            literal = self._literal.get(match[0], match[0])
            written = literal if match[0] in self._literal else self._encoder.seal(literal)
            plain += [piece, literal]
            sealed += [piece, written]
            plain_at += len(piece) + len(literal)
            sealed_at += len(piece) + len(written)
            at = match.end()
            starts.append(at)
            to_plain.append(plain_at - at)
            sealed_starts.append(sealed_at)
            back.append(plain_at - sealed_at)
        plain.append(text[at:])
        sealed.append(text[at:])
        moved = _shift(spans, starts, to_plain)
        return Rendered("".join(plain), moved, "".join(sealed), (sealed_starts, back))

    def _label(self, rendered: Rendered, ids: np.ndarray, offsets: list[Span], train_on: TrainOn) -> Encoded:
        if train_on == "all":
            return Encoded(rendered.text, ids, ids.copy(), offsets, True)
        labels = np.full_like(ids, MASKED)
        starts = [start for start, _ in offsets]
        ends = [end for _, end in offsets]
        spans = rendered.spans[-1:] if train_on == "last_response" else rendered.spans
        closed = True
        for start, end in spans:
            first, after = bisect_left(starts, start), bisect_right(ends, end)
            labels[first:after] = ids[first:after]
            closed = closed and after > first and int(ids[after - 1]) == self.end_token_id
        return Encoded(rendered.text, ids, labels, offsets, closed)


def _texts(message: Message) -> list[str]:
    return [message["content"], message["input"]] if "input" in message else [message["content"]]


def _shift(spans: Sequence[Span], starts: list[int], deltas: list[int]) -> list[Span]:
    """Moves spans: each position by the delta of the last breakpoint at or before it (breakpoints follow a token)."""

    def move(position: int) -> int:
        return position + deltas[bisect_right(starts, position) - 1]

    return [(move(start), move(end)) for start, end in spans]
