"""Suite `passkey`: whether a number is found that stands somewhere in a long text of no interest.

The task is that of Mohtashami and Jaggi (arXiv 2305.16300), in words of our own: it tells how far back a
model sees at all, not how well it makes use of that. Every length is asked at several depths.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.counts import INTERVALS, counted, said
from llama_ft.evaluate.positions import check_length
from llama_ft.evaluate.result import SuiteResult
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

BEGINNING = "A number is hidden in the text below. All the rest of it does not matter. Find the number and remember it."
FILLER = (
    "The llamas rest on the hill.",
    "A river runs through the valley.",
    "Clouds move over the village.",
    "Somebody shuts a gate.",
    "Then it is quiet again.",
)
HIDDEN = "The hidden number is {key}. Remember it: {key} is the hidden number."
QUESTION = "Which number was hidden in the text? The hidden number is"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the number stands: share of the filler before it."""
KEYS = 4
"""Numbers that are hidden at each length and depth, where --limit gives no other: twenty questions of each length."""
PARTS = (8, 4, 2, 1)
"""Where no lengths are named: what part of the longest each is."""
MAX_TOKENS = 12
"""Of an answer: a space and five digits have six at most in tokenizers that cut numbers into digits."""
AT_ONCE = 16384
"""Tokens of questions after whose answers rows are kept."""
SHOWN = 120
"""Characters at both ends of a question that its row shows."""


@dataclass(frozen=True)
class Question:
    """One text with a number in it: `length` tokens are aimed at, and never exceeded together with an answer."""

    id: str
    length: int
    depth: float
    key: str


class Passkey:
    """See the module."""

    name = "passkey"
    about = "a number hidden in a long text, by length and depth"
    kinds = ()

    def needs(self, context: Context) -> list[Problem]:
        """Nothing."""
        return []

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. UserError for lengths that it does not read, or too short ones."""
        lengths = lengths_of(subject, context)
        keys = context.limit or KEYS
        settings = context.settings(self.name, subject, lengths=lengths, depths=DEPTHS, keys=keys)
        rows: list[dict[str, Any]] = []
        for length in lengths:
            asked = questions(length, keys, context.seed)
            at_once = max(1, AT_ONCE // length)
            rows += context.items(subject, settings, f"{length:,} tokens", asked, _ask(subject), at_once=at_once)
        names = [name for length in lengths for name in (whole_name(length), *(cell_name(length, d) for d in DEPTHS))]
        scores = [score for name in names if (score := counted(rows, name)) is not None]
        wholes = {whole_name(length) for length in lengths}
        found = ", ".join(f"{score.name} {said(score)}" for score in scores if score.name in wholes)
        remarks = [f"found at {found}; {INTERVALS}"]
        return SuiteResult(
            self.name, subject.name, scores, rows, settings, context.seconds(self.name, subject), remarks=remarks
        )


def whole_name(length: int) -> str:
    """The score of a length: `8,192 tokens`."""
    return f"{length:,} tokens"


def cell_name(length: int, depth: float) -> str:
    """The score of a length and a depth: `8,192 tokens, depth 25 %`."""
    return f"{length:,} tokens, depth {100 * depth:g} %"


def lengths_of(subject: Subject, context: Context) -> list[int]:
    """Those that are named, else parts of what the run was trained on or the subject reads. UserError for more than it
    reads."""
    if context.lengths:
        check_length(subject, max(context.lengths))
        return context.lengths
    own = context.run.recipe.sequence.max_length if context.run is not None else subject.context
    return sorted({max(1, min(own, subject.context) // part) for part in PARTS})


def questions(length: int, keys: int, seed: int) -> list[Question]:
    """`keys` questions at each depth; numbers of five digits, which depend on the seed and the question alone."""
    found = []
    for depth in DEPTHS:
        for number in range(keys):
            name = f"{length}:{depth:g}:{number}"
            digest = hashlib.blake2b(f"passkey {seed} {name}".encode(), digest_size=8).digest()
            key = str(np.random.default_rng(int.from_bytes(digest, "little")).integers(10_000, 100_000))
            found.append(Question(name, length, depth, key))
    return found


def written(question: Question, encode: Callable[[str], list[int]]) -> tuple[str, list[int]]:
    """A question as text and as ids: as many sentences of filler as `length` leaves room for, an answer counted in.
    UserError where not even one fits."""

    def put(sentences: int) -> str:
        before = round(question.depth * sentences)
        filler = [FILLER[place % len(FILLER)] for place in range(sentences)]
        middle = " ".join([*filler[:before], HIDDEN.format(key=question.key), *filler[before:]])
        return f"{BEGINNING}\n\n{middle}\n\n{QUESTION}"

    room = question.length - MAX_TOKENS
    bare, some = len(encode(put(0))), 20 * len(FILLER)
    each = (len(encode(put(some))) - bare) / some
    sentences = int((room - bare) / each) + 2  # a little too many: the last ones are taken away one by one
    while sentences > 0:
        text = put(sentences)
        ids = encode(text)
        if len(ids) <= room:
            return text, ids
        sentences -= 1
    least = bare + MAX_TOKENS + round(each) + 1
    what = f"{question.length} tokens leave no room for a text around a number"
    raise UserError(what, key="--lengths", hint=f"{least} tokens or more")


def read_key(answer: str) -> str | None:
    """The first number of an answer, None without one."""
    found = re.search(r"\d+", answer)
    return found[0] if found else None


def _ask(subject: Subject) -> Callable[[Sequence[Question], Callable[[int], None]], list[dict[str, Any]]]:
    tokenizer = subject.tokenizer

    def encode(text: str) -> list[int]:
        ids = [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]
        # A tokenizer that closes texts would have the model begin another.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

    def work(asked: Sequence[Question], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        texts = [written(one, encode) for one in asked]
        answers = subject.answers([ids for _, ids in texts], MAX_TOKENS, tick=tick)
        rows = []
        for one, (text, ids), [answer] in zip(asked, texts, answers, strict=True):
            hit = float(read_key(answer.text) == one.key)
            shown = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"
            row = {"id": one.id, "asked": shown, "answer": answer.text, "wanted": one.key, "tokens": len(ids)}
            rows.append({**row, "values": {whole_name(one.length): hit, cell_name(one.length, one.depth): hit}})
        return rows

    return work


SUITE = Passkey()
