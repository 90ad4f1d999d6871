"""What kind of tokenizer a file is, by its content: `tokenizer.model` is SentencePiece or, since Llama 3, tiktoken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from llama_ft.errors import UserError
from llama_ft.tokenizer.from_llama2c import is_llama2c

FileKind = Literal["huggingface", "sentencepiece", "tiktoken", "llama2c"]
_HEAD = 4096
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# A ModelProto begins with its first piece: field 1, its length (one byte), and in it field 1 again, the text.
_PIECE = re.compile(rb"\n[\x02-\x7f]\n", re.DOTALL)
_JUNK = [
    (re.compile(rb"\s*\Z"), "is empty", "fetch it again"),
    (
        re.compile(rb"version https://git-lfs"),
        "is a Git LFS pointer: the name of the file, not the file",
        "run `git lfs pull` in its folder, or fetch the file itself",
    ),
    (
        re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE),
        "is a web page",
        "the download gave a page instead of the file; a gated file wants a login first",
    ),
]


def kind_of(path: Path) -> FileKind | None:
    """The kind of tokenizer that `path` holds; None when it is something else. Reads the first 4 KiB.

    Raises :class:`UserError` when the file cannot be opened.
    """
    head = _head(path)
    if path.name == "tokenizer.json":  # JSON has no mark of its own, and transformers knows this one by its name
        return "huggingface"
    if is_llama2c(head):
        return "llama2c"
    if _RANK.match(head):
        return "tiktoken"
    return "sentencepiece" if _PIECE.match(head) else None


def known_kind(path: Path) -> FileKind:
    """The same for a file that ought to be a tokenizer: :class:`UserError` says what it is instead."""
    kind = kind_of(path)
    if kind is not None:
        return kind
    head = _head(path)
    for sign, said, hint in _JUNK:
        if sign.match(head):
            raise UserError(f"the tokenizer file {path} {said}", hint=hint)
    raise UserError(
        f"{path} is not a tokenizer: it begins with {head[:16]!r}",
        hint="expected tokenizer.json, a SentencePiece file (LLaMA 1, 2), tiktoken ranks (Llama 3) or llama2.c's "
        "tokenizer.bin; fetch it again if it should be one of them",
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise UserError(f"the tokenizer file {path} cannot be read: {error.strerror or error}") from error
