"""Checks that a prepared set can teach what the recipe wants; each fault has a name under which it can be allowed."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from llama_ft.data.documents import Document
from llama_ft.data.layouts import Conversation
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.report import Fault
from llama_ft.data.sources import Source
from llama_ft.errors import UserError


def conversation_key(conversation: Conversation, seed: int | None = None) -> bytes:
    """16 bytes that are equal for equal conversations; with `seed`, an order drawn by that seed (BLAKE2b, keyed)."""
    text = json.dumps(conversation, ensure_ascii=False, sort_keys=True)
    key = b"" if seed is None else seed.to_bytes(8, "big")
    return hashlib.blake2b(text.encode(), digest_size=16, key=key).digest()


def check_template(renderer: Renderer, train_on: str) -> list[Fault]:
    """Faults that the template and the tokenizer show before any row is read.

    Raises :class:`UserError` when the template cannot say what the assistant said although labels need it.
    """
    template = renderer.template
    if train_on != "all" and not template.has_generation:
        hint = "name a shipped template (such as chatml), mark the answers in a copy of this one, or set train_on: all"
        what = (
            f"the template '{template.name}' does not mark answers with {{% generation %}}: nothing could be labelled"
        )
        raise UserError(what, key="template", hint=hint)
    try:
        end = renderer.end_token_id
    except TemplateRefusal as refusal:
        what = f"the template '{template.name}' refuses one question with one answer: {refusal}"
        raise UserError(what, key="template") from refusal
    missing = renderer.missing_control()
    if missing:
        what = f"the template '{template.name}' writes {', '.join(missing)}, not tokens of this tokenizer"
        hint = "name another template, or a tokenizer that has them"
        return [Fault("control-tokens", f"{what}: they would be cut into letters", None, hint)]
    if end is None and train_on != "all":
        what = f"an answer of the template '{template.name}' ends without a labelled control token"
        return [Fault("end-token-unlabelled", f"{what}: the model would not learn to stop", None, _CLOSE)]
    return []


class DocumentChecks:
    """Looks at every kept document and remembers the first place of each fault."""

    def __init__(self, renderer: Renderer, train_on: str):
        self._bos = renderer.tokenizer.bos_token_id
        self._needs_end = train_on != "all" and renderer.end_token_id is not None
        self._seen: dict[str, tuple[int, str]] = {}
        self._train: set[bytes] = set()

    def look(self, document: Document, source: Source) -> None:
        """Checks one kept document of any role."""
        if self._needs_end and not document.closed and not document.truncated:
            self._note("end-token-unlabelled", source.where(document.row))
        ids = document.ids
        if self._bos is not None and np.any((ids[1:] == self._bos) & (ids[:-1] == self._bos)):
            self._note("two-bos", source.where(document.row))

    def train(self, key: bytes) -> None:
        """Remembers a training conversation."""
        self._train.add(key)

    def evaluate(self, key: bytes, where: str) -> None:
        """Notes an evaluation conversation that is also a training one."""
        if key in self._train:
            self._note("eval-in-train", where)

    def faults(self) -> list[Fault]:
        """One fault per kind, with its count and first place."""
        said = {
            "end-token-unlabelled": ("documents have an answer whose end token carries no loss", _CLOSE),
            "two-bos": ("documents have two BOS tokens in a row", "write {{ bos_token }} once in the template"),
            "eval-in-train": ("held-out conversations are also training rows", "remove them from one side"),
        }
        return [Fault(name, f"{n:,} {said[name][0]}", where, said[name][1]) for name, (n, where) in self._seen.items()]

    def _note(self, name: str, where: str) -> None:
        count, first = self._seen.get(name, (0, where))
        self._seen[name] = (count + 1, first)


_CLOSE = "write the end token inside {% generation %} … {% endgeneration %}"
